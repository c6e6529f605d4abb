"""The optimizer's step: norm, clipping, update or skip, and what ends with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

from gemini.autograd.engine_access import EngineAccess
from gemini.autograd.loss_scale import LossScaler
from gemini.chunk.layout import ParamPlace
from gemini.gradients.arrivals import Gradients
from gemini.gradients.grad_attributes import GradAttributes
from gemini.kernels.adam_tile import AdamSegment
from gemini.runtime.adaptation import PlanInForce
from gemini.runtime.clipping import Clipping
from gemini.runtime.lookahead import Lookahead
from gemini.runtime.memory_probe import MemoryProbe
from gemini.runtime.skipped_steps import SkippedSteps
from gemini.runtime.step_clock import StepClock
from gemini.update.job import PlannedUpdate, StepPlanner
from gemini.update.schedule import UpdateSchedule

__all__ = ["ComingStep", "StepControl"]


class ComingStep:
    """What is known about the next step, for which gradients are being collected.

    Args:
        scaler: of the loss; None: it is not scaled.
    """

    def __init__(self, scaler: LossScaler | None) -> None:
        self.scaler = scaler
        self.clipping = Clipping()
        self._optimizer: weakref.ref[StepPlanner] | None = None

    @property
    def optimizer(self) -> StepPlanner | None:
        """The optimizer that may update the parameters, the newest one made of them; None if there is none."""
        return None if self._optimizer is None else self._optimizer()

    @property
    def had_optimizer(self) -> bool:
        """Whether there has been an optimizer, which may be gone."""
        return self._optimizer is not None

    def follow(self, optimizer: StepPlanner) -> None:
        """Expect the step of an optimizer, which is not kept alive, in place of any before it."""
        self._optimizer = weakref.ref(optimizer)

    @property
    def loss_scale(self) -> float:
        """Loss scale that is included in the gradients."""
        return self.scaler.scale if self.scaler is not None else 1.0

    @property
    def gradient_scale(self) -> float:
        """Factor for waiting gradients: applies clipping, removes the loss scale."""
        return self.clipping.factor / self.loss_scale

    def expected_update(self, chunk_id: int) -> PlannedUpdate | None:
        """Return the update that the step will plan for a chunk if nothing changes before; None if unknown."""
        optimizer = self.optimizer
        if optimizer is None:
            return None
        return PlannedUpdate(optimizer.expected_segments(chunk_id), self.gradient_scale)


class StepControl:
    """The steps of one engine.

    Args:
        coming: what is known of the coming step.
        placement: the plan in force, which a step may change.
        gradients: what the step consumes.
        grad_attributes: what other code leaves in `.grad`.
        updates: runs updates.
        lookahead: knows what is used next.
        probe: measures what is not the engine's.
        access: held by the thread that trains.
        check_usable: raises ModelError if the engine is not.
        has_commits: whether updates wait for `updates.release`.
        is_sharded: whether several ranks own the chunks.
        max_skipped_steps: how many steps may be skipped in a row; None: any number.
    """

    def __init__(
        self,
        coming: ComingStep,
        placement: PlanInForce,
        *,
        gradients: Gradients,
        grad_attributes: GradAttributes,
        updates: UpdateSchedule,
        lookahead: Lookahead,
        probe: MemoryProbe,
        access: EngineAccess,
        check_usable: Callable[[], None],
        has_commits: bool,
        is_sharded: bool,
        max_skipped_steps: int | None,
    ) -> None:
        self.coming = coming
        self.clock = StepClock()
        self._placement = placement
        self._num_steps = 0
        self.num_skipped_steps = 0
        """Steps that were not taken, because a gradient was not finite."""
        self._gradients = gradients
        self._grad_attributes = grad_attributes
        self._updates = updates
        self._lookahead = lookahead
        self._probe = probe
        self._access = access
        self._check_usable = check_usable
        self._has_commits = has_commits
        self._is_sharded = is_sharded
        self._skipped = SkippedSteps(coming.scaler, most_in_a_row=max_skipped_steps)

    @property
    def num_steps(self) -> int:
        """Number of steps taken, including those before a loaded checkpoint or commit."""
        return self._num_steps

    def resume_at(self, num_steps: int) -> None:
        """Count on from the steps that a checkpoint or a commit was made after."""
        self._num_steps = num_steps

    def gradient_norm(self, places: Sequence[ParamPlace]) -> float:
        """Compute the exact L2 norm of some parameters' gradients, loss scale taken out; see Clipping.norm_of."""
        self._check_usable()
        self._access.check_thread("a norm of gradients")
        self.collect_gradients()
        self._grad_attributes.add_zeros()
        names = (place.spec.name for place in places)
        return self.coming.clipping.norm_of(self._gradients.sums_of_squares(), names, loss_scale=self.coming.loss_scale)

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the current gradients so that a norm becomes at most `max_norm`, as torch's clip_grad_norm_ does."""
        self.coming.clipping.clip(norm, max_norm)

    def update(self, segments: Mapping[int, tuple[AdamSegment, ...]]) -> None:
        """Update parameters and consume all gradients; depending on the overlap, the work continues after the return.

        With commits the work waits for `updates.release`.

        Args:
            segments: by chunk id, what to do to its elements, sorted; all of them have a gradient.

        Raises:
            OffloadIOError: state could not be read or written; the engine refuses to go on.
            ModelError: the engine is closed or its state was lost, or someone looks at weights that will move.
        """
        self._check_usable()
        scale = self.coming.gradient_scale
        planned = {chunk_id: PlannedUpdate(parts, scale) for chunk_id, parts in segments.items()}
        start = self._updates.defer if self._has_commits else self._updates.take_step
        start(planned, kept=self._lookahead.needed_soon(self._placement.plan.num_slots))
        if self.coming.scaler is not None:
            self.coming.scaler.update(found_overflow=False)
        self._skipped.note_taken()
        self._num_steps += 1
        self._end_step(is_clipped=self.coming.clipping.factor != 1.0)
        if not self._is_sharded and not self._has_commits:  # else it would wait for updates
            self._lookahead.fetch_ahead()

    def skip_update(self) -> None:
        """Drop the gradients of a step whose norm is not finite.

        Raises:
            SkippedStepsError: it was one too many; it has been skipped nevertheless.
        """
        self._skipped.note_skipped()
        if self._has_commits:
            self._updates.defer({}, kept=())
        self.num_skipped_steps += 1
        self._end_step(is_clipped=True)
        self._skipped.check()

    def has_gradients(self) -> bool:
        """Return whether gradients wait for a step."""
        self.collect_gradients()
        return self._gradients.num_backwards > 0

    def clear_gradients(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients at hand.

        Args:
            set_to_none: False: keep zeros for the parameters that have had one, which the next step then updates.

        Raises:
            ModelError: the engine is closed or its state was lost.
        """
        self._check_usable()
        self._access.check_thread("zero_grad()")
        self._grad_attributes.clear(set_to_none=set_to_none)
        self._drop_gradients()

    def collect_gradients(self) -> None:
        """Take what other code has left in `.grad`."""
        self._grad_attributes.collect(on_found=self.coming.clipping.check_open)

    def _drop_gradients(self) -> None:
        self._updates.discard()
        self._gradients.clear()
        self.coming.clipping.factor = 1.0

    def _end_step(self, *, is_clipped: bool) -> None:
        self._updates.end_step(is_clipped=is_clipped)
        self._gradients.expected_backwards = self._gradients.num_backwards
        self._grad_attributes.end_step()
        self._drop_gradients()
        if self._lookahead.is_in_step:
            self.clock.end_step()
            self._probe.end_step()
            if (peak := self._probe.non_model_peak_nbytes) is not None:
                self._placement.after_step(peak)
        self._lookahead.end_step()
