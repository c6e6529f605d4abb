"""Turns a plan into moves, step by step: what the hooks report becomes leases, fetches, gradients and updates.

All decisions are asked of gemini.placement, all bytes moved by gemini.chunk and gemini.offload. One runtime serves
one engine; it is driven from the thread that trains and, on CUDA, from autograd's device thread, never from
both at once; see engine_access.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from gemini.autograd.engine_access import EngineAccess
from gemini.autograd.events import Moments
from gemini.autograd.gradient_sink import GradientPlace
from gemini.autograd.loss_scale import LossScaler, scale_gradients_of
from gemini.chunk.chunk import Chunk
from gemini.chunk.core import ChunkCore
from gemini.chunk.layout import ChunkLayout, ParamSlot
from gemini.commits.journal import UpdateJournal
from gemini.commits.record import CommittedStep
from gemini.config import GeminiConfig
from gemini.errors import GeminiError, ModelError
from gemini.gradients.grad_attributes import GradAttributes
from gemini.gradients.sharded import ShardedGradients
from gemini.gradients.store import GradientStore
from gemini.kernels.adam_tile import AdamSegment
from gemini.kernels.device import DeviceKernels
from gemini.model.tensor_parallel import local_part, take_local_gradient
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.placement.overlap import OverlapMode
from gemini.placement.plan import ChunkDemand, MemoryDemand, PlacementPlan, RuntimeShape, memory_demand
from gemini.placement.tracer import Phase
from gemini.ranks.sharding import Sharding
from gemini.runtime.adaptation import Adaptation
from gemini.runtime.clipping import Clipping
from gemini.runtime.lookahead import Lookahead
from gemini.runtime.memory_probe import MemoryProbe
from gemini.runtime.pending_save import SaveSlot
from gemini.runtime.saved_weights import SavedWeights
from gemini.runtime.skipped_steps import SkippedSteps
from gemini.runtime.step_clock import StepClock
from gemini.update.schedule import Overlap, StepPlanner, StepWish
from gemini.update.worker import UpdateWorker

__all__ = ["Runtime"]


@dataclass
class _Entry:
    """A unit that is running."""

    unit_id: int
    has_pushed_hooks: bool


class Runtime:
    """Everything of one engine that moves.

    Args:
        config: what the user asked for.
        layout: units and chunks.
        plan: homes of all chunks.
        demands: what placement knows of them, by id.
        shape: sizes of the buffers.
        resources: closed by `close`.
        core: chunks and slots; closed by `close`.
        states: home of each trainable chunk's optimizer state, by chunk id; closed by `close`.
        gradients: closed by `close`.
        worker: runs updates; closed by `close`.
        kernels: the device's.
        sharding: the ranks that share the model; None: there are no others. Closed by `close`.
        journal: makes updates outlive the process; None: nothing does. Its file is closed by `close`.
        recovered: the step that the journal's file held; None: it held none.
    """

    def __init__(
        self,
        config: GeminiConfig,
        *,
        layout: ChunkLayout,
        plan: PlacementPlan,
        demands: Sequence[ChunkDemand],
        shape: RuntimeShape,
        resources: Resources,
        core: ChunkCore,
        states: Mapping[int, TiledHome],
        gradients: GradientStore | ShardedGradients,
        worker: UpdateWorker,
        kernels: DeviceKernels,
        sharding: Sharding | None = None,
        journal: UpdateJournal | None = None,
        recovered: CommittedStep | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.plan = plan
        self.demands = demands
        self.shape = shape
        self.resources = resources
        self.core = core
        self.states = states
        self.gradients = gradients
        self.sharding = sharding
        self.moments = Moments()
        self.journal = journal
        self.recovered = recovered
        self.probe = MemoryProbe(resources.transfers.device, resources.ledger)
        self.scaler = LossScaler(config.initial_loss_scale) if config.dtype is torch.float16 else None
        self.grad_attributes = GradAttributes(core.chunks, gradients, is_scaled=self.scaler is not None)
        self.optimizer: weakref.ref[StepPlanner] | None = None
        """The optimizer that may update the parameters; the newest one made of them."""
        self.access = EngineAccess()
        self.num_steps = 0
        self.num_skipped_steps = 0
        asked = None if config.overlap == "auto" else OverlapMode(config.overlap)
        self.overlap = Overlap(asked, core=core, states=states, gradients=gradients, worker=worker, kernels=kernels)
        num_slots, is_sharded = plan.num_slots, sharding is not None
        self.lookahead = Lookahead(core, depth=config.prefetch_depth, num_slots=num_slots, is_sharded=is_sharded)
        self.saved = SavedWeights(core.chunk_in, core.absent.get, self._weights_in_backward)
        self._entered: list[_Entry] = []
        self._place_of_param: dict[int, tuple[int, int]] = {
            id(param): (chunk.spec.chunk_id, position)
            for chunk in core.chunks
            for position, param in enumerate(chunk.params)
        }
        self._has_pushed_for_model = False
        self._clipping = Clipping()
        self._skipped = SkippedSteps(self.scaler, most_in_a_row=config.max_skipped_steps)
        self._clock = StepClock()
        self.saving = SaveSlot()
        self._adaptation: Adaptation | None = None
        if shape.has_device and config.placement == "auto" and isinstance(gradients, GradientStore):
            self._adaptation = Adaptation(core, gradients, demands, shape, settle=self.overlap.settle_all)
        self.overlap.predict = self._predict
        self.overlap.urgency = self.lookahead.urgency

    @property
    def demand(self) -> MemoryDemand:
        """Bytes by tier and purpose that the plan in force takes."""
        return memory_demand(self.demands, self.plan, self.shape)

    @property
    def step_s(self) -> float | None:
        """Median seconds of the newest steps, from the start of forward to the end of the update; None before two."""
        return self._clock.step_s

    # ---------------------------------------------------------------- forward

    def begin_forward(self) -> None:
        """Start the outermost forward.

        Raises:
            ModelError: the engine is closed, its state was lost, or a parameter was moved or re-flagged.
        """
        self.check_usable()
        self.overlap.check_released()
        if torch.is_grad_enabled() and not self.lookahead.is_in_step:
            self._clock.begin_step()
        for chunk in self.core.chunks:
            chunk.check_params()
        if torch._C._current_graph_task_id() == -1:  # else a backward pass is running this forward
            self._collect_gradients()
        self._drop_leftovers()
        self.lookahead.gather_now(self.layout.root.own_chunk_ids)  # used anywhere, without notice
        if torch.is_grad_enabled() and not self.lookahead.is_in_step:
            self.probe.begin_step()
        self.lookahead.begin_forward(Phase.TRAIN if torch.is_grad_enabled() else Phase.INFERENCE)
        self._has_pushed_for_model = torch.is_grad_enabled()
        if self._has_pushed_for_model:
            self.saved.push()

    def end_forward(self) -> None:
        """End the outermost forward, by return or exception."""
        if self._has_pushed_for_model:
            self.saved.pop()
            self._has_pushed_for_model = False
        self.lookahead.end_forward()

    def abort_forward(self) -> None:
        """Undo what a forward has begun that was interrupted, and so has neither left its units nor ended."""
        self.saved.drop(sum(entry.has_pushed_hooks for entry in self._entered) + self._has_pushed_for_model)
        self._has_pushed_for_model = False
        self._drop_leftovers()
        self.end_forward()

    def enter_unit(self, unit_id: int) -> None:
        """Lease a unit's chunks and start fetching what comes next.

        Args:
            unit_id: the unit.

        Raises:
            OutOfTierMemoryError: no slot can be freed.
            OffloadIOError: weights cannot be read.
            ModelError: the engine is closed or its state was lost.
        """
        self.check_usable()
        unit = self.layout.units[unit_id]
        leased: list[int] = []
        try:
            for chunk_id in unit.chunk_ids:
                self.core.access(chunk_id)
                leased.append(chunk_id)
            for chunk_id in unit.chunk_ids:
                self.lookahead.record(chunk_id)
            self.lookahead.fetch_ahead()
        except GeminiError:
            for chunk_id in leased:
                self.core.release(chunk_id)
            raise
        is_grad_enabled = torch.is_grad_enabled()
        if is_grad_enabled:
            self.saved.push()
        self._entered.append(_Entry(unit_id, is_grad_enabled))

    def exit_unit(self, unit_id: int) -> None:
        """Give a unit's leases back."""
        entry = self._entered.pop()
        assert entry.unit_id == unit_id, f"left unit {unit_id} while in unit {entry.unit_id}"
        if entry.has_pushed_hooks:
            self.saved.pop()
        for chunk_id in self.layout.units[unit_id].chunk_ids:
            self.core.release(chunk_id)
        for chunk_id in self.layout.units[unit_id].own_chunk_ids:
            self.core.chunks[chunk_id].check_written()

    def num_updates_of(self, unit_id: int) -> int:
        """Return how often the optimizer has changed a unit's weights."""
        chunks = [self.core.chunks[chunk_id] for chunk_id in self.layout.units[unit_id].chunk_ids]
        return sum(chunk.num_updates + chunk.num_writes for chunk in chunks)

    def wrap_outputs(self, output: Any) -> Any:
        """Scale the gradients that will enter the model through its outputs, if float16 needs it."""
        if self.scaler is None or not torch.is_grad_enabled():
            return output
        return scale_gradients_of(output, self.scaler.scale)

    def is_borrowed(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in a slot."""
        local = local_part(tensor)
        return type(local) is torch.Tensor and self.core.is_slot(local.untyped_storage().data_ptr())

    # ---------------------------------------------------------------- backward

    def enter_backward(self, unit_id: int, *, reads_weights: bool) -> None:
        """Make a unit's weights usable before backward runs it, for recomputation that fires no hooks.

        Needs no lease: the chunks of the unit used last are never evicted, and autograd runs all of a unit before
        anything that came before it in forward.
        """
        self.check_usable()
        self.access.check_thread("a backward")
        self.gradients.reach_unit(self.layout.units[unit_id].own_chunk_ids, self.lookahead.urgency)
        for chunk_id in self.layout.units[unit_id].chunk_ids if reads_weights else ():
            self.core.ensure(chunk_id)
            self.lookahead.record(chunk_id)
        self.lookahead.fetch_ahead()

    def take_gradient(self, param: torch.nn.Parameter) -> None:
        """Take a gradient from autograd."""
        self.access.check_thread("a backward")
        grad = take_local_gradient(param)
        self._clipping.check_open()
        place = self._place_of_param[id(param)]
        self.gradients.fulfil_all(*place)
        self.gradients.put(*place, grad)

    def finish_gradient(self, param: torch.nn.Parameter) -> None:
        """Handle that all uses of a parameter in this backward pass have delivered by themselves."""
        self.gradients.finish_uses(*self._place_of_param[id(param)])

    def expect_gradient(self, param: torch.nn.Parameter) -> None:
        """Expect that a use of a parameter will deliver its gradient by itself, if it may then."""
        self.gradients.expect(*self._place_of_param[id(param)])

    def takes_gradients_apart(self, param: torch.nn.Parameter, num_uses: int) -> bool:
        """Return whether uses of a parameter, of which backward may run so many, may deliver by themselves."""
        return self.gradients.takes_apart(*self._place_of_param[id(param)], num_uses=num_uses)

    def put_gradient(self, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Take the gradient of one use of a parameter."""
        self._clipping.check_open()
        place = self._place_of_param[id(param)]
        self.gradients.fulfil(*place)
        self.gradients.put(*place, gradient)

    def write_gradient(self, param: torch.nn.Parameter) -> AbstractContextManager[GradientPlace] | None:
        """Open the memory of a parameter's gradient to one of its uses; None where it must be put."""
        self._clipping.check_open()
        place = self._place_of_param[id(param)]
        if not self.gradients.can_write(place[0]):
            return None
        self.gradients.fulfil(*place)
        return self.gradients.writing(*place)

    def _weights_in_backward(self, chunk: Chunk) -> torch.Tensor:
        self.check_usable()
        if self.sharding is not None and chunk.compute is not None and not chunk.is_resident:
            self.core.protect(chunk.spec.chunk_id)  # and no more: ranks may use more of a unit, or less, than others
        elif not chunk.is_resident:
            self.core.ensure(chunk.spec.chunk_id)
            self.lookahead.record(chunk.spec.chunk_id)
            self.lookahead.fetch_ahead()
        assert chunk.compute is not None
        return chunk.compute

    # ---------------------------------------------------------------- update

    def slot_of(self, param: torch.Tensor) -> ParamSlot | None:
        """Return a parameter's place in the layout, None if it is not the engine's."""
        place = self._place_of_param.get(id(param))
        return None if place is None else self.layout.chunks[place[0]].slots[place[1]]

    def gradient_norm(self, slots: Sequence[ParamSlot]) -> float:
        """Compute the exact L2 norm of some parameters' gradients, loss scale taken out; see Clipping.norm_of."""
        self.check_usable()
        self.access.check_thread("a norm of gradients")
        self._collect_gradients()
        self.grad_attributes.add_zeros()
        names = (slot.spec.name for slot in slots)
        return self._clipping.norm_of(self.gradients.sums_of_squares(), names, loss_scale=self._loss_scale)

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the gradients at hand so that a norm becomes at most `max_norm`, as torch's clip_grad_norm_ does."""
        self._clipping.clip(norm, max_norm)

    def update(self, segments: Mapping[int, tuple[AdamSegment, ...]]) -> None:
        """Update parameters and consume all gradients; depending on the overlap, the work goes on after the return.

        With a journal the work waits for `overlap.release`.

        Args:
            segments: by chunk id, what to do to its elements, sorted; all of them have a gradient.

        Raises:
            OffloadIOError: state could not be read or written; the engine refuses to go on.
            ModelError: the engine is closed or its state was lost, or someone looks at weights that will move.
        """
        self.check_usable()
        scale = self._clipping.factor / self._loss_scale
        wishes = {chunk_id: StepWish(parts, scale) for chunk_id, parts in segments.items()}
        start = self.overlap.take_step if self.journal is None else self.overlap.hold
        start(wishes, kept=self.lookahead.needed_soon(self.plan.num_slots))
        if self.scaler is not None:
            self.scaler.update(found_overflow=False)
        self._skipped.note_taken()
        self.num_steps += 1
        self._end_step(is_clipped=self._clipping.factor != 1.0)
        if self.sharding is None and self.journal is None:  # else it would wait for updates
            self.lookahead.fetch_ahead()

    def _predict(self, chunk_id: int) -> StepWish | None:
        optimizer = None if self.optimizer is None else self.optimizer()
        if optimizer is None:
            return None
        return StepWish(optimizer.expected_segments(chunk_id), self._clipping.factor / self._loss_scale)

    def skip_update(self) -> None:
        """Drop the gradients of a step whose norm is not finite.

        Raises:
            SkippedStepsError: it was one too many; it has been skipped nevertheless.
        """
        self._skipped.note_skipped()
        if self.journal is not None:
            self.overlap.hold({}, kept=())
        self.num_skipped_steps += 1
        self._end_step(is_clipped=True)
        self._skipped.check()

    def has_gradients(self) -> bool:
        """Return whether gradients wait for a step."""
        self._collect_gradients()
        return self.gradients.num_backwards > 0

    def clear_gradients(self, *, set_to_none: bool = True) -> None:
        """Forget the gradients at hand.

        Args:
            set_to_none: False: keep zeros for the parameters that have had one, which the next step then updates.

        Raises:
            ModelError: the engine is closed or its state was lost.
        """
        self.check_usable()
        self.access.check_thread("zero_grad()")
        self.grad_attributes.clear(set_to_none=set_to_none)
        self._drop_gradients()

    def _collect_gradients(self) -> None:
        self.grad_attributes.collect(on_found=self._clipping.check_open)

    def _drop_gradients(self) -> None:
        self.overlap.discard()
        self.gradients.clear()
        self._clipping.factor = 1.0

    def finish_updates(self) -> None:
        """Block until the last step has happened, every byte of it, and nothing has been made of the next.

        Raises:
            OffloadIOError: a read or write failed.
            CheckpointError: a checkpoint that was being saved is lost, which is said once.
            ModelError: the engine is closed or its state was lost.
        """
        self.check_usable()
        self.access.check_thread("reading or loading weights")
        self.overlap.check_released()
        self.saving.finish()
        self.overlap.settle_all()
        self.overlap.discard()
        for chunk in self.core.chunks:
            chunk.home.finish_writes()
        for state in self.states.values():
            state.finish_writes()

    def _end_step(self, *, is_clipped: bool) -> None:
        self.overlap.end_step(is_clipped=is_clipped)
        self.gradients.expected_backwards = self.gradients.num_backwards
        self.grad_attributes.end_step()
        self._drop_gradients()
        if self.lookahead.is_in_step:
            self._clock.end_step()
            self.probe.end_step()
            peak = self.probe.non_model_peak_nbytes
            if self._adaptation is not None and peak is not None:
                self.plan = self._adaptation.after_step(self.plan, peak_nbytes=peak)
        self.lookahead.end_step()

    @property
    def gradient_scale(self) -> float:
        """What gradients that wait must be multiplied by to be the loss's: clipping and loss scale."""
        return self._clipping.factor / self._loss_scale

    @property
    def _loss_scale(self) -> float:
        return self.scaler.scale if self.scaler is not None else 1.0

    # ---------------------------------------------------------------- life

    def __getstate__(self) -> object:
        raise ModelError(
            "a model wrapped by GeminiDDP cannot be copied or pickled: its weights live in memory and files of their "
            "own; load engine.state_dict() into a plain copy of the model instead"
        )

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.access.is_closed

    def check_usable(self) -> None:
        """Raise ModelError if the engine is closed, its state was lost, or it belongs to the parent of this process."""
        self.access.check(self.overlap.failure)
        if self.sharding is not None:
            self.sharding.group.check()

    def _drop_leftovers(self) -> None:
        """Forget what an exception in an earlier forward or backward may have left behind."""
        self._entered.clear()
        self.core.drop_leases()

    def close(self, *, keep: bool = False) -> None:
        """Wait for what is under way and give everything back, but, with `keep`, what was committed; idempotent."""
        if self.access.is_closed:
            return
        self.access.is_closed = True
        self.saving.close()
        self.overlap.close()
        self.gradients.close()
        for state in self.states.values():
            state.close()
        self.core.close()
        self.resources.close(keep=keep)
        if self.journal is not None:
            self.journal.file.close()
        if self.sharding is not None:
            self.sharding.group.close()
