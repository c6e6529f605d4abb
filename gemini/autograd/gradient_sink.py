"""Where one use of a parameter may leave its gradient, instead of with autograd.

[Note: Gradients past autograd]
Autograd adds a parameter's gradient up over all its uses before anybody sees it, and wants a dense tensor from each. Of
a tied embedding two are alive from the head's backward to the embedding's, and the embedding's is zero but for the
batch's rows. So the engine attaches a sink to each parameter: its memory where gradients wait. A use that knows of
sinks takes a `GradientUse` in forward; in backward it writes there and tells autograd None. The uses are those in
gemini.autograd.parameter_uses and gemini.nn.linear_cross_entropy; all others go through autograd, and the memory sums
both.

A use asks in backward whether that will do: not if the gradient is wanted from torch.autograd.grad, or differentiated
again, or shown to the user's hooks, nor where the sum would lose autograd's bits. In float32 it has them: the uses are
added in autograd's order. Half-precision weights' gradients are added in the float32 in which they wait.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd.graph import get_gradient_edge

__all__ = ["GradientPlace", "GradientSink", "GradientUse", "attach_sink", "detach_sink", "sink_of", "use_of"]

_SINK_ATTRIBUTE = "_gemini_gradient_sink"


@dataclass(frozen=True, slots=True)
class GradientPlace:
    """Memory in which a parameter's gradient waits, open for writing."""

    values: torch.Tensor
    """Shaped as the parameter, of the dtype in which gradients wait."""
    is_empty: bool
    """Whether `values` holds nothing yet, and every element must be written."""

    def add(self, rows: slice, gradient: torch.Tensor) -> None:
        """Add to consecutive rows, each of which is added to once.

        Args:
            rows: in the first dimension.
            gradient: of these rows, any float dtype.
        """
        if self.is_empty:
            self.values[rows].copy_(gradient)
        else:
            self.values[rows].add_(gradient)

    def add_rows(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add to some rows; the others' gradient is zero.

        Args:
            rows: int64 [num_rows], in the first dimension, none twice.
            gradient: of these rows, any float dtype, [num_rows, ...].
        """
        if self.is_empty:
            self.values.zero_()
        self.values.index_add_(0, rows, gradient.to(self.values.dtype))


class GradientSink(Protocol):
    """Takes gradients of one parameter."""

    def expect(self, use: GradientUse) -> None:
        """Expect one more use that will deliver by itself, if it may then; to be held weakly."""

    def is_open(self) -> bool:
        """Return, in backward, whether a use may deliver by itself."""

    def put(self, gradient: torch.Tensor) -> None:
        """Take a use's whole gradient: any float dtype and strides, the parameter's shape; read only."""

    def write(self) -> AbstractContextManager[GradientPlace] | None:
        """Open the memory for a use's whole gradient; None where it must be given to `put`."""


class GradientUse:
    """One use of a parameter in the graph, from forward to backward.

    Args:
        param: the parameter, a leaf that requires a gradient.
        sink: the parameter's.
    """

    def __init__(self, param: torch.Tensor, sink: GradientSink) -> None:
        self._param = param
        with torch._C.DisableTorchFunction():  # looking at the graph is no use of the parameter
            self._accumulation = get_gradient_edge(param).node
        self.sink = sink
        self._last_pass: int | None = None
        sink.expect(self)

    def may_run(self) -> bool:
        """Return, in backward, whether the pass under way may have run or may yet run this use.

        No if an earlier pass did and freed its part of the graph.
        """
        return self._last_pass in (None, torch._C._current_graph_task_id())

    def is_open(self) -> bool:
        """Return, from this use's own backward, whether its gradient may go past autograd."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._last_pass = torch._C._current_graph_task_id()
        if torch.is_grad_enabled() or self._param._backward_hooks or not self.sink.is_open():
            return False
        try:
            return torch._C._will_engine_execute_node(self._accumulation)
        except RuntimeError:  # torch.autograd.grad wants this gradient
            return False


def attach_sink(param: torch.Tensor, sink: GradientSink) -> None:
    """Let uses of a parameter deliver to a sink."""
    setattr(param, _SINK_ATTRIBUTE, sink)


def detach_sink(param: torch.Tensor) -> None:
    """Undo `attach_sink`."""
    if hasattr(param, _SINK_ATTRIBUTE):
        delattr(param, _SINK_ATTRIBUTE)


def sink_of(param: torch.Tensor) -> GradientSink | None:
    """Return the sink attached to a tensor."""
    sink: GradientSink | None = getattr(param, _SINK_ATTRIBUTE, None)
    return sink


def use_of(param: torch.Tensor) -> GradientUse | None:
    """Announce a use of a tensor, in forward, outside of any autograd function.

    Args:
        param: any tensor.

    Returns:
        None if the tensor has no sink or will get no gradient.
    """
    sink = sink_of(param)
    if sink is None or not param.requires_grad or not torch.is_grad_enabled() or param._backward_hooks:
        return None
    return GradientUse(param, sink)
