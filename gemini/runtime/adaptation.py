"""Once a step has been measured, use what is left of the device: for resident chunks, then for sums of gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from gemini.chunk.core import ChunkCore
from gemini.gradients.arrivals import Gradients
from gemini.placement.accumulators import choose_accumulators
from gemini.placement.plan import ChunkDemand, PlacementPlan, RuntimeShape, memory_demand
from gemini.placement.residency import adapt_residency
from gemini.tiers import MemoryTier, format_nbytes

__all__ = ["Adaptation"]

logger = logging.getLogger(__name__)

NON_MODEL_MARGIN = 1.05
"""Activations and temporaries may grow by this factor after the step that measured them."""


class Adaptation:
    """Adapts one engine's use of the device, once each, to what its first steps have shown.

    Args:
        core: the chunks.
        gradients: of the same chunks.
        chunks: what placement knows of them, by id.
        shape: sizes of the buffers.
        finish_updates: finishes all updates under way.
    """

    def __init__(
        self,
        core: ChunkCore,
        gradients: Gradients,
        chunks: Sequence[ChunkDemand],
        shape: RuntimeShape,
        *,
        finish_updates: Callable[[], None],
    ) -> None:
        budget = core.resources.ledger.budget_nbytes(MemoryTier.DEVICE)
        assert budget is not None, "there is no device to adapt to"
        self._budget_nbytes = budget
        self._core = core
        self._gradients = gradients
        self._chunks = chunks
        self._shape = shape
        self._finish_updates = finish_updates
        self._is_adapted = False
        self._has_accumulators = False

    def after_step(self, plan: PlacementPlan, *, peak_nbytes: int) -> PlacementPlan:
        """Adapt to a step that has been measured; nothing is held, and there are no gradients.

        Args:
            plan: what is in force.
            peak_nbytes: what everything but chunks took at its peak.

        Returns:
            The plan now in force.
        """
        if not self._is_adapted:
            self._is_adapted = True
            self._finish_updates()
            plan = self._adapt_residents(plan, peak_nbytes)
        keeps_float32 = self._shape.grad_itemsize == 4
        if keeps_float32 and not self._has_accumulators and self._gradients.expected_backwards > 1:
            self._has_accumulators = True
            self._open_accumulators(plan, peak_nbytes)
        return plan

    def _adapt_residents(self, plan: PlacementPlan, peak_nbytes: int) -> PlacementPlan:
        """Give chunks a copy on the device, or take it from them, so that the budget is used and kept."""
        core, budget = self._core, self._budget_nbytes
        device_nbytes = budget - int(peak_nbytes * NON_MODEL_MARGIN)
        adapted = adapt_residency(self._chunks, plan, self._shape, device_nbytes=device_nbytes)
        for before, after in zip(plan.chunks, adapted.chunks, strict=True):
            if before.is_resident and not after.is_resident:
                core.residents.give_up(after.chunk_id)
        for before, after in zip(plan.chunks, adapted.chunks, strict=True):
            if after.is_resident and not before.is_resident:
                core.residents.take_in(after.chunk_id)
        held = memory_demand(self._chunks, adapted, self._shape).total(MemoryTier.DEVICE)
        sizes = tuple(map(format_nbytes, (budget, held, peak_nbytes)))
        logger.info("device budget %s: chunks take %s, everything else took %s in the first step", *sizes)
        if held + peak_nbytes > budget:
            logger.warning(
                "device budget %s is exceeded: chunks take %s, everything else %s; use smaller batches or activation "
                "checkpointing, or raise device_budget",
                *sizes,
            )
        return adapted

    def _open_accumulators(self, plan: PlacementPlan, peak_nbytes: int) -> None:
        """Let as many chunks as fit sum their gradients on the device."""
        held_nbytes = self._core.resources.ledger.held_nbytes(MemoryTier.DEVICE)
        free_nbytes = self._budget_nbytes - int(peak_nbytes * NON_MODEL_MARGIN) - held_nbytes
        chosen = choose_accumulators(self._chunks, plan, free_nbytes=free_nbytes)
        for chunk_id in chosen:
            self._gradients.accumulators.open(self._core.chunks[chunk_id].spec)
        logger.info("%d of %d chunks sum their gradients on the device", len(chosen), len(self._chunks))
