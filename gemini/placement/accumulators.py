"""Which chunks sum their gradients on the device while one backward pass follows another."""

from __future__ import annotations

from collections.abc import Sequence

from gemini.placement.plan import ChunkDemand, PlacementPlan
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["choose_accumulators"]


def choose_accumulators(chunks: Sequence[ChunkDemand], plan: PlacementPlan, *, free_nbytes: int) -> list[int]:
    """Choose the chunks that get a float32 accumulator, 4 bytes an element.

    All save alike per byte, except that a gradient on disk is read and written once more for every pass; so these come
    first, and within each kind the first chunks, whose gradients come last and are waited for.

    Args:
        chunks: the chunks, by id.
        plan: their homes.
        free_nbytes: device bytes that nothing else takes.

    Returns:
        Chunk ids. Chunks whose gradients wait on the device need none.
    """
    below = [demand for demand in chunks if plan.chunks[demand.chunk_id].grad in (MemoryTier.HOST, MemoryTier.NVME)]
    order = sorted(below, key=lambda demand: plan.chunks[demand.chunk_id].grad is not MemoryTier.NVME)
    chosen = []
    for demand in order:
        nbytes = round_up(4 * demand.numel, IO_ALIGNMENT_NBYTES)
        if nbytes <= free_nbytes:
            free_nbytes -= nbytes
            chosen.append(demand.chunk_id)
    return chosen
