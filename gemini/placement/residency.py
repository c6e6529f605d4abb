"""Which chunks keep a copy on the device: chosen anew once steps have shown how much memory they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape, memory_demand
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["adapt_residency", "expected_peak_nbytes", "without_copies"]


def adapt_residency(
    chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape, *, device_nbytes: int
) -> PlacementPlan:
    """Choose anew which chunks keep a copy on the device; homes and slots stay as they are.

    Copies are added from the last chunk to the first (the turn of the step comes first to use them) as long as they
    fit, and given up from the first to the last until the rest fits.

    Args:
        chunks: the chunks, by id.
        plan: what is in force.
        shape: sizes of the buffers.
        device_nbytes: device bytes that chunks may take, what everything else needs already subtracted.

    Returns:
        The new plan; the old one if nothing changes.
    """
    free_nbytes = device_nbytes - memory_demand(chunks, plan, shape).total(MemoryTier.DEVICE)
    homes = list(plan.chunks)
    if free_nbytes >= 0:
        for demand in reversed(chunks):
            if not homes[demand.chunk_id].is_resident and _copy_nbytes(demand) <= free_nbytes:
                free_nbytes -= _copy_nbytes(demand)
                homes[demand.chunk_id] = dataclasses.replace(homes[demand.chunk_id], is_resident=True)
    else:
        for demand in chunks:
            if free_nbytes < 0 and _may_stream(demand, homes[demand.chunk_id], plan):
                free_nbytes += _copy_nbytes(demand)
                homes[demand.chunk_id] = dataclasses.replace(homes[demand.chunk_id], is_resident=False)
    return plan if tuple(homes) == plan.chunks else dataclasses.replace(plan, chunks=tuple(homes))


def without_copies(
    chunks: Sequence[ChunkDemand], plan: PlacementPlan, chunk_ids: Collection[int] | None = None
) -> PlacementPlan:
    """Return a plan in which chunks have no copy on the device that they can do without.

    Args:
        chunks: the chunks, by id.
        plan: the plan in force.
        chunk_ids: chunks that lose their copy; None: all that can take turns in the slots.

    Returns:
        The new plan; the old one if nothing changes.
    """
    homes = list(plan.chunks)
    for demand in chunks:
        is_asked = chunk_ids is None or demand.chunk_id in chunk_ids
        if is_asked and _may_stream(demand, homes[demand.chunk_id], plan):
            homes[demand.chunk_id] = dataclasses.replace(homes[demand.chunk_id], is_resident=False)
    return plan if tuple(homes) == plan.chunks else dataclasses.replace(plan, chunks=tuple(homes))


def expected_peak_nbytes(peak_nbytes: int, *, measured_numel: int, batch_numel: int) -> int:
    """Return what a batch will take beside chunks, in proportion to the largest batch that was measured.

    Args:
        peak_nbytes: most bytes that everything but chunks took in a step.
        measured_numel: elements of the largest batch of those steps; 0 if none is known.
        batch_numel: elements of the batch.

    Returns:
        Bytes, `peak_nbytes` at least.
    """
    if batch_numel <= measured_numel or not measured_numel:
        return peak_nbytes
    return -(-peak_nbytes * batch_numel // measured_numel)


def _copy_nbytes(demand: ChunkDemand) -> int:
    return round_up(demand.compute_nbytes, IO_ALIGNMENT_NBYTES)


def _may_stream(demand: ChunkDemand, homes: ChunkPlacement, plan: PlacementPlan) -> bool:
    """Return whether a resident chunk has a copy to give up, and a slot to take turns in."""
    has_copy = homes.is_resident and MemoryTier.DEVICE not in homes.working
    return has_copy and not demand.is_pinned and plan.num_slots > 0 and demand.compute_nbytes <= plan.slot_nbytes
