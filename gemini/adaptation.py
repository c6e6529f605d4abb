"""Once a step has been measured, use what is left of the device: for resident chunks, then for sums of gradients."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from gemini.chunk.core import ChunkCore
from gemini.gradients import GradientStore
from gemini.placement.accumulators import choose_accumulators
from gemini.placement.plan import ChunkDemand, PlacementPlan, RuntimeShape, memory_demand
from gemini.placement.residency import adapt_residency
from gemini.tiers import MemoryTier, format_nbytes

__all__ = ["adapt_to_peak", "open_accumulators"]

logger = logging.getLogger(__name__)

NON_MODEL_MARGIN = 1.05
"""Activations and temporaries may grow by this factor after the step that measured them."""


def adapt_to_peak(
    core: ChunkCore,
    chunks: Sequence[ChunkDemand],
    plan: PlacementPlan,
    shape: RuntimeShape,
    *,
    peak_nbytes: int,
) -> PlacementPlan:
    """Give chunks a copy on the device, or take it from them, so that the budget is used and kept.

    Args:
        core: the chunks; none is leased.
        chunks: what placement knows of them, by id.
        plan: what is in force.
        shape: sizes of the buffers.
        peak_nbytes: what everything but chunks took at its peak.

    Returns:
        The plan now in force.
    """
    budget = core.resources.ledger.budget_nbytes(MemoryTier.DEVICE)
    assert budget is not None
    adapted = adapt_residency(chunks, plan, shape, device_nbytes=budget - int(peak_nbytes * NON_MODEL_MARGIN))
    for before, after in zip(plan.chunks, adapted.chunks, strict=True):
        if before.is_resident and not after.is_resident:
            core.unsettle(after.chunk_id)
    for before, after in zip(plan.chunks, adapted.chunks, strict=True):
        if after.is_resident and not before.is_resident:
            core.reside(after.chunk_id)
    held = memory_demand(chunks, adapted, shape).total(MemoryTier.DEVICE)
    sizes = tuple(map(format_nbytes, (budget, held, peak_nbytes)))
    logger.info("device budget %s: chunks take %s, everything else took %s in the first step", *sizes)
    if held + peak_nbytes > budget:
        logger.warning(
            "device budget %s is exceeded: chunks take %s, everything else %s; use smaller batches or activation "
            "checkpointing, or raise device_budget",
            *sizes,
        )
    return adapted


def open_accumulators(
    core: ChunkCore,
    chunks: Sequence[ChunkDemand],
    plan: PlacementPlan,
    gradients: GradientStore,
    *,
    peak_nbytes: int,
) -> None:
    """Let as many chunks as fit sum their gradients on the device.

    Args:
        core: the chunks.
        chunks: what placement knows of them, by id.
        plan: what is in force.
        gradients: at rest.
        peak_nbytes: what everything but chunks took at its peak.
    """
    ledger = core.resources.ledger
    budget = ledger.budget_nbytes(MemoryTier.DEVICE)
    assert budget is not None
    free_nbytes = budget - int(peak_nbytes * NON_MODEL_MARGIN) - ledger.held_nbytes(MemoryTier.DEVICE)
    chosen = choose_accumulators(chunks, plan, free_nbytes=free_nbytes)
    for chunk_id in chosen:
        gradients.accumulators.open(core.chunks[chunk_id].spec)
    logger.info("%d of %d chunks sum their gradients on the device", len(chosen), len(chunks))
