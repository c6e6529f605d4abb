"""The events that an engine's hooks report, and their receivers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from gemini.autograd.engine_access import EngineAccess
from gemini.autograd.gradient_sink import GradientPlace

__all__ = ["MomentListener", "Moments", "RuntimeEvents"]


class MomentListener(Protocol):
    """A receiver of the moments of a step."""

    def moment(self, kind: str, unit_id: int) -> None:
        """Note that a unit, or with number 0 the model, is entered ("enter"), left ("leave") or reached by backward."""


class Moments:
    """Passes the moments of a step on to all listeners."""

    def __init__(self) -> None:
        self._listeners: list[MomentListener] = []

    @property
    def listeners(self) -> tuple[MomentListener, ...]:
        """Listeners in the order in which they are called."""
        return tuple(self._listeners)

    def add(self, listener: MomentListener) -> None:
        """Report every moment to a listener from now on."""
        self._listeners.append(listener)

    def remove(self, listener: MomentListener) -> None:
        """Stop telling a listener."""
        self._listeners.remove(listener)

    def note(self, kind: str, unit_id: int) -> None:
        """Report a moment to all listeners; see MomentListener."""
        for listener in self._listeners:
            listener.moment(kind, unit_id)


class RuntimeEvents(Protocol):
    """The receiver of all events of the hooks."""

    access: EngineAccess
    """Access right that the thread holds while it runs the model or a unit of it."""
    moments: Moments
    """Listeners. A unit's moments are told after its weights are there and before they may go, the model's before and
    after everything else."""

    def begin_forward(self, batch_numel: int) -> None:
        """Handle the start of the outermost forward of the model, called with tensors of so many elements in all."""

    def end_forward(self) -> None:
        """Handle the end of the outermost forward, by return or exception."""

    def abort_forward(self) -> None:
        """Undo what an interrupted forward has begun."""

    def enter_unit(self, unit_id: int) -> None:
        """Make a unit's weights usable and keep them until `exit_unit`."""

    def exit_unit(self, unit_id: int) -> None:
        """Release what `enter_unit` took."""

    def enter_backward(self, unit_id: int, *, reads_weights: bool) -> None:
        """Handle that backward has reached a unit's outputs; make its weights usable if it reads any."""

    def num_updates_of(self, unit_id: int) -> int:
        """Return how often the optimizer has changed a unit's weights."""

    def take_gradient(self, param: torch.nn.Parameter) -> None:
        """Take the gradient that autograd has just accumulated into `param.grad`."""

    def finish_gradient(self, param: torch.nn.Parameter) -> None:
        """Handle that all uses of a parameter in this backward pass have delivered their gradients directly."""

    def expect_gradient(self, param: torch.nn.Parameter) -> None:
        """Expect that a use of a parameter delivers its gradient directly, if it may then."""

    def takes_gradients_apart(self, param: torch.nn.Parameter, num_uses: int) -> bool:
        """Return whether uses of a parameter, of which backward may run the given number, may deliver directly."""

    def put_gradient(self, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        """Take the gradient of one use of a parameter."""

    def write_gradient(self, param: torch.nn.Parameter) -> AbstractContextManager[GradientPlace] | None:
        """Open the memory of a parameter's gradient to one of its uses; None where that is not possible."""

    def is_borrowed(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is in memory that will be refilled with other weights."""

    def wrap_outputs(self, output: Any) -> Any:
        """Prepare the model's results for backward (loss scaling)."""
