"""Use what steps leave of the device for resident chunks and sums of gradients, and give it back to larger batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from gemini.chunk.core import ChunkCore
from gemini.errors import OutOfTierMemoryError
from gemini.gradients.arrivals import Gradients
from gemini.placement.accumulators import choose_accumulators
from gemini.placement.plan import ChunkDemand, PlacementPlan, RuntimeShape
from gemini.placement.residency import adapt_residency, expected_peak_nbytes, without_copies
from gemini.tiers import MemoryTier, format_nbytes

__all__ = ["Adaptation", "FixedPlan", "PlanInForce"]

logger = logging.getLogger(__name__)

NON_MODEL_MARGIN = 1.05
"""Factor by which activations and temporaries may grow after the step that measured them."""


class PlanInForce(Protocol):
    """The plan in force, and what may change it: batches and steps; nothing is held when one of these is called."""

    @property
    def plan(self) -> PlacementPlan:
        """The plan."""

    def before_forward(self, batch_numel: int) -> None:
        """Make room for a batch that is larger than any before.

        Args:
            batch_numel: elements of the tensors that the model is called with.
        """

    def after_failure(self) -> None:
        """Give up every copy that the device can do without, because it has run out of memory."""

    def after_step(self, peak_nbytes: int) -> None:
        """Adapt to a step that has been measured; there are no gradients.

        Args:
            peak_nbytes: most bytes that everything but chunks has taken in any step so far.
        """


class FixedPlan:
    """A plan that nothing changes: the user's own, one that ranks share, or one without a device."""

    def __init__(self, plan: PlacementPlan) -> None:
        self.plan = plan

    def before_forward(self, batch_numel: int) -> None:
        """Do nothing."""

    def after_failure(self) -> None:
        """Do nothing."""

    def after_step(self, peak_nbytes: int) -> None:
        """Do nothing."""


class Adaptation:
    """Adapts one engine's use of the device to the measured needs of its steps. Is PlanInForce.

    Copies and sums are optional: if the device has no memory for one, it is left out with a warning.

    Args:
        plan: the plan to begin with.
        core: the chunks.
        gradients: of the same chunks.
        chunks: what placement knows of them, by id.
        shape: sizes of the buffers.
        reserve_nbytes: device bytes that the user wants to be kept free for activations, at least.
        finish_updates: finishes all updates under way.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        core: ChunkCore,
        gradients: Gradients,
        chunks: Sequence[ChunkDemand],
        shape: RuntimeShape,
        *,
        reserve_nbytes: int,
        finish_updates: Callable[[], None],
    ) -> None:
        budget = core.resources.ledger.budget_nbytes(MemoryTier.DEVICE)
        assert budget is not None, "there is no device to adapt to"
        self.plan = plan
        # - What there is
        self._budget_nbytes = budget
        self._reserve_nbytes = reserve_nbytes
        self._core = core
        self._gradients = gradients
        self._chunks = chunks
        self._shape = shape
        self._finish_updates = finish_updates
        # - What is known
        self._peak_nbytes: int | None = None
        """Most bytes that everything but chunks has taken in a step; None before one was measured."""
        self._measured_numel = 0
        """Elements of the largest batch that has been measured."""
        self._batch_numel = 0
        """Elements of the largest batch of the step under way."""
        self._has_accumulators = False
        self._may_promote = True

    def before_forward(self, batch_numel: int) -> None:
        """Make room for a batch that is larger than any before; see PlanInForce."""
        self._batch_numel = max(self._batch_numel, batch_numel)
        if self._peak_nbytes is None or batch_numel <= self._measured_numel:
            return
        expected = expected_peak_nbytes(self._peak_nbytes, measured_numel=self._measured_numel, batch_numel=batch_numel)
        self._make_room(expected)

    def after_failure(self) -> None:
        """Give up every copy that the device can do without; see PlanInForce."""
        self._finish_updates()
        self._exchange(without_copies(self._chunks, self.plan))

    def after_step(self, peak_nbytes: int) -> None:
        """Adapt to a step that has been measured; see PlanInForce."""
        self._measured_numel = max(self._measured_numel, self._batch_numel)
        self._batch_numel = 0
        if self._peak_nbytes is None or peak_nbytes > self._peak_nbytes:
            self._peak_nbytes = peak_nbytes
            self._finish_updates()
            self._adapt_residents(peak_nbytes)
        keeps_float32 = self._shape.grad_itemsize == 4
        if keeps_float32 and not self._has_accumulators and self._gradients.expected_backwards > 1:
            self._has_accumulators = True
            self._open_accumulators(peak_nbytes)

    def _room_nbytes(self, peak_nbytes: int) -> int:
        """Return the device bytes that are left for chunks, without the bytes of accumulators."""
        kept_nbytes = max(int(peak_nbytes * NON_MODEL_MARGIN), self._reserve_nbytes)
        return self._budget_nbytes - kept_nbytes - self._gradients.accumulators.nbytes

    def _make_room(self, peak_nbytes: int) -> None:
        room_nbytes = self._room_nbytes(peak_nbytes)
        held_nbytes = self._core.resources.ledger.held_nbytes(MemoryTier.DEVICE) - self._gradients.accumulators.nbytes
        if held_nbytes <= room_nbytes:
            return
        self._finish_updates()
        adapted = adapt_residency(self._chunks, self.plan, self._shape, device_nbytes=room_nbytes)
        num_before, num_after = (sum(homes.is_resident for homes in each.chunks) for each in (self.plan, adapted))
        logger.info(
            "a larger batch may take %s; %d of %d chunks stay on the device",
            format_nbytes(peak_nbytes),
            num_after,
            num_before,
        )
        self._exchange(adapted)

    def _adapt_residents(self, peak_nbytes: int) -> None:
        """Give chunks a copy on the device, or take it from them, so that the budget is used and kept."""
        room_nbytes = self._room_nbytes(peak_nbytes)
        self._exchange(adapt_residency(self._chunks, self.plan, self._shape, device_nbytes=room_nbytes))
        budget_nbytes = self._budget_nbytes
        held_nbytes = self._core.resources.ledger.held_nbytes(MemoryTier.DEVICE)
        sizes = tuple(map(format_nbytes, (budget_nbytes, held_nbytes, peak_nbytes)))
        logger.info("device budget %s: chunks take %s, everything else took %s in a step", *sizes)
        if held_nbytes + peak_nbytes > budget_nbytes:
            logger.warning(
                "device budget %s is exceeded: chunks take %s, everything else %s; use smaller batches or activation "
                "checkpointing, or raise device_budget",
                *sizes,
            )

    def _exchange(self, wanted: PlacementPlan) -> None:
        """Give copies up and take copies in; then the wanted plan is in force, as far as the device has allowed it."""
        residents = self._core.residents
        pairs = [
            (before.is_resident, after)
            for before, after in zip(self.plan.chunks, wanted.chunks, strict=True)
            if before.is_resident is not after.is_resident
        ]
        for was_resident, homes in pairs:
            if was_resident:
                residents.give_up(homes.chunk_id)
        refused: set[int] = set()
        for was_resident, homes in pairs:
            if was_resident:
                continue
            try:
                if self._may_promote:
                    residents.take_in(homes.chunk_id)
            except OutOfTierMemoryError as error:
                self._may_promote = False
                logger.warning(
                    "no more chunks are kept on the device, because it has no memory for another one: %s", error
                )
            if not self._may_promote:
                refused.add(homes.chunk_id)
        self.plan = without_copies(self._chunks, wanted, refused) if refused else wanted

    def _open_accumulators(self, peak_nbytes: int) -> None:
        """Open accumulators on the device for as many chunks as fit."""
        free_nbytes = self._room_nbytes(peak_nbytes) - self._core.resources.ledger.held_nbytes(MemoryTier.DEVICE)
        chosen = choose_accumulators(self._chunks, self.plan, free_nbytes=free_nbytes)
        num_opened = 0
        try:
            for chunk_id in chosen:
                self._gradients.accumulators.open(self._core.chunks[chunk_id].spec)
                num_opened += 1
        except OutOfTierMemoryError as error:
            logger.warning(
                "the device has no memory for sums of gradients, which stay in host memory or on disk: %s", error
            )
        logger.info("%d of %d chunks sum their gradients on the device", num_opened, len(self._chunks))
