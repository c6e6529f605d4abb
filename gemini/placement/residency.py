"""Use the device memory that the first step has shown to be free, or give back what it has shown to be needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape, memory_demand
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["adapt_residency"]


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


def _copy_nbytes(demand: ChunkDemand) -> int:
    return round_up(demand.compute_nbytes, IO_ALIGNMENT_NBYTES)


def _may_stream(demand: ChunkDemand, homes: ChunkPlacement, plan: PlacementPlan) -> bool:
    """Return whether a resident chunk has a copy to give up, and a slot to take turns in."""
    has_copy = homes.is_resident and MemoryTier.DEVICE not in homes.working
    return has_copy and not demand.is_pinned and plan.num_slots > 0 and demand.compute_nbytes <= plan.slot_nbytes
