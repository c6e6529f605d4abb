"""Turns the events of forward and backward into holds, fetches and gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from gemini.autograd.engine_access import EngineAccess
from gemini.autograd.events import Moments
from gemini.autograd.gradient_sink import GradientPlace
from gemini.autograd.loss_scale import scale_gradients_of
from gemini.chunk.chunk import Chunk
from gemini.chunk.core import ChunkCore
from gemini.chunk.layout import ChunkLayout
from gemini.errors import GeminiError
from gemini.gradients.arrivals import Gradients
from gemini.model.tensor_parallel import local_part, take_local_gradient
from gemini.placement.tracer import Phase
from gemini.runtime.adaptation import PlanInForce
from gemini.runtime.lookahead import Lookahead
from gemini.runtime.memory_probe import MemoryProbe
from gemini.runtime.refuses_copies import RefusesCopies
from gemini.runtime.saved_weights import SavedWeights
from gemini.runtime.step import StepControl

__all__ = ["Passes"]

logger = logging.getLogger(__name__)


@dataclass
class _Entry:
    """A unit that is running."""

    unit_id: int
    has_pushed_hooks: bool


class Passes(RefusesCopies):
    """Forward and backward passes of one engine; see gemini.autograd.events.RuntimeEvents.

    Args:
        layout: units and chunks.
        core: chunks and slots.
        gradients: take what backward makes.
        lookahead: is told of uses, and fetches ahead.
        steps: the steps that the passes belong to.
        placement: makes room for larger batches.
        probe: measures the memory of a step.
        access: held by the thread that runs the model.
        check_usable: raises ModelError if the engine is not.
        check_released: raises ModelError if a step waits for its commit.
        place_of_param: chunk and position of each parameter, by its id.
        is_sharded: whether several ranks own the chunks.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        *,
        core: ChunkCore,
        gradients: Gradients,
        lookahead: Lookahead,
        steps: StepControl,
        placement: PlanInForce,
        probe: MemoryProbe,
        access: EngineAccess,
        check_usable: Callable[[], None],
        check_released: Callable[[], None],
        place_of_param: Mapping[int, tuple[int, int]],
        is_sharded: bool,
    ) -> None:
        self.access = access
        self.moments = Moments()
        self.saved = SavedWeights(core.chunk_in, core.by_placeholder.get, self._weights_in_backward)
        self._layout = layout
        self._core = core
        self._gradients = gradients
        self._direct = gradients.direct
        self._lookahead = lookahead
        self._steps = steps
        self._placement = placement
        self._probe = probe
        self._check_usable = check_usable
        self._check_released = check_released
        self._place_of_param = place_of_param
        self._is_sharded = is_sharded
        self._entered: list[_Entry] = []
        self._has_pushed_for_model = False
        self._has_warned_of_autocast = False

    # ---------------------------------------------------------------- forward

    def begin_forward(self, batch_numel: int) -> None:
        """Start the outermost forward.

        Args:
            batch_numel: elements of the tensors that the model is called with.

        Raises:
            ModelError: the engine is closed, its state was lost, or a parameter was moved or re-flagged.
        """
        self._check_usable()
        self._check_released()
        begins_step = torch.is_grad_enabled() and not self._lookahead.is_in_step
        if begins_step:
            self._steps.clock.begin_step()
        for chunk in self._core.chunks:
            chunk.params.check()
        if torch._C._current_graph_task_id() == -1:  # else a backward pass is running this forward
            self._steps.collect_gradients()
        self._drop_leftovers()
        self._warn_of_autocast()
        self._placement.before_forward(batch_numel)
        self._lookahead.gather_now(self._layout.root.own_chunk_ids)  # used anywhere, without notice
        if begins_step:
            self._probe.begin_step()
        self._lookahead.begin_forward(Phase.TRAIN if torch.is_grad_enabled() else Phase.INFERENCE)
        self._has_pushed_for_model = torch.is_grad_enabled()
        if self._has_pushed_for_model:
            self.saved.push()

    def end_forward(self) -> None:
        """End the outermost forward, by return or exception."""
        if self._has_pushed_for_model:
            self.saved.pop()
            self._has_pushed_for_model = False
        self._lookahead.end_forward()

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
        self._check_usable()
        unit = self._layout.units[unit_id]
        held: list[int] = []
        try:
            for chunk_id in unit.chunk_ids:
                self._core.access(chunk_id)
                held.append(chunk_id)
            for chunk_id in unit.chunk_ids:
                self._lookahead.record(chunk_id)
            self._lookahead.fetch_ahead()
        except GeminiError:
            for chunk_id in held:
                self._core.release(chunk_id)
            raise
        is_grad_enabled = torch.is_grad_enabled()
        if is_grad_enabled:
            self.saved.push()
        self._entered.append(_Entry(unit_id, is_grad_enabled))

    def exit_unit(self, unit_id: int) -> None:
        """Give a unit's holds back."""
        entry = self._entered.pop()
        assert entry.unit_id == unit_id, f"left unit {unit_id} while in unit {entry.unit_id}"
        if entry.has_pushed_hooks:
            self.saved.pop()
        for chunk_id in self._layout.units[unit_id].chunk_ids:
            self._core.release(chunk_id)
        for chunk_id in self._layout.units[unit_id].own_chunk_ids:
            self._core.chunks[chunk_id].params.check_written()

    def num_updates_of(self, unit_id: int) -> int:
        """Return how often the optimizer has changed a unit's weights."""
        chunks = [self._core.chunks[chunk_id] for chunk_id in self._layout.units[unit_id].chunk_ids]
        return sum(chunk.num_updates + chunk.num_writes for chunk in chunks)

    def wrap_outputs(self, output: Any) -> Any:
        """Scale the gradients that will enter the model through its outputs, if float16 needs it."""
        if self._steps.coming.scaler is None or not torch.is_grad_enabled():
            return output
        return scale_gradients_of(output, self._steps.coming.scaler.scale)

    def is_borrowed(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in a slot."""
        local = local_part(tensor)
        return type(local) is torch.Tensor and self._core.slots.find(local.untyped_storage().data_ptr()) is not None

    # ---------------------------------------------------------------- backward

    def enter_backward(self, unit_id: int, *, reads_weights: bool) -> None:
        """Make a unit's weights usable before backward runs it, for recomputation that fires no hooks.

        Needs no hold: the chunks of the unit used last are never evicted, and autograd runs all of a unit before
        anything that came before it in forward.
        """
        self._check_usable()
        self.access.check_thread("a backward")
        self._gradients.reach_unit(self._layout.units[unit_id].own_chunk_ids, self._lookahead.distance)
        for chunk_id in self._layout.units[unit_id].chunk_ids if reads_weights else ():
            self._core.ensure(chunk_id)
            self._lookahead.record(chunk_id)
        self._lookahead.fetch_ahead()

    def take_gradient(self, param: torch.nn.Parameter) -> None:
        """Take a gradient from autograd."""
        self.access.check_thread("a backward")
        grad = take_local_gradient(param)
        self._steps.coming.clipping.check_open()
        place = self._place_of_param[id(param)]
        if self._direct is not None:
            self._direct.autograd_delivers(*place)
        self._gradients.put(*place, grad)

    def finish_gradient(self, param: torch.nn.Parameter) -> None:
        """Handle that all uses of a parameter in this backward pass have delivered by themselves."""
        if self._direct is not None:
            self._direct.finish_uses(*self._place_of_param[id(param)])

    def expect_gradient(self, param: torch.nn.Parameter) -> None:
        """Expect that a use of a parameter will deliver its gradient by itself, if it may then."""
        if self._direct is not None:
            self._direct.expect(*self._place_of_param[id(param)])

    def takes_gradients_apart(self, param: torch.nn.Parameter, num_uses: int) -> bool:
        """Return whether uses of a parameter, of which backward may run so many, may deliver by themselves."""
        if self._direct is None:
            return False
        return self._direct.takes_apart(*self._place_of_param[id(param)], num_uses=num_uses)

    def put_gradient(self, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Take the gradient of one use of a parameter."""
        self._steps.coming.clipping.check_open()
        place = self._place_of_param[id(param)]
        if self._direct is not None:
            self._direct.use_delivers(*place)
        self._gradients.put(*place, gradient)

    def write_gradient(self, param: torch.nn.Parameter) -> AbstractContextManager[GradientPlace] | None:
        """Open the memory of a parameter's gradient to one of its uses; None where it must be put."""
        self._steps.coming.clipping.check_open()
        place = self._place_of_param[id(param)]
        if self._direct is None or not self._direct.can_write(place[0]):
            return None
        self._direct.use_delivers(*place)
        return self._direct.writing(*place)

    def _weights_in_backward(self, chunk: Chunk) -> torch.Tensor:
        self._check_usable()
        if self._is_sharded and chunk.compute is not None and not chunk.is_resident:
            # And no more: ranks may use more of a unit, or less, than others.
            self._core.slots.protect(chunk.spec.chunk_id, is_used_now=False)
        elif not chunk.is_resident:
            self._core.ensure(chunk.spec.chunk_id)
            self._lookahead.record(chunk.spec.chunk_id)
            self._lookahead.fetch_ahead()
        assert chunk.compute is not None
        return chunk.compute

    def _warn_of_autocast(self) -> None:
        """Warn once that autograd keeps copies of float32 weights in compute memory until backward."""
        device = self._core.resources.transfers.device.type
        if self._has_warned_of_autocast or not torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
            return
        if any(chunk.spec.dtype is torch.float32 and chunk.spec.is_trainable for chunk in self._core.chunks):
            self._has_warned_of_autocast = True
            logger.warning(
                "torch.autocast with float32 working weights: autograd keeps a copy of every weight in %s in "
                "compute memory from forward to backward, so streaming them saves no memory; leave autocast out "
                "and set GeminiConfig(dtype=torch.bfloat16), which keeps float32 masters",
                str(torch.get_autocast_dtype(device)).removeprefix("torch."),
            )

    def _drop_leftovers(self) -> None:
        """Forget what an exception in an earlier forward or backward may have left behind."""
        self._entered.clear()
        self._core.drop_holds()
