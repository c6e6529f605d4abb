"""The memory to which one use of a parameter may write its gradient, bypassing autograd.

[Note: Gradients past autograd]
Autograd sums a parameter's gradient over all its uses before any hook sees it, and needs a dense tensor from each. For
a tied embedding, two such tensors are alive from the head's backward to the embedding's, and the embedding's is zero
except for the batch's rows. So the engine attaches a sink to each parameter: the memory where its gradient waits. A use
that knows sinks takes a `GradientUse` in forward; in backward it writes to the sink and returns None to autograd. These
uses are in gemini.autograd.parameter_uses and gemini.nn.linear_cross_entropy. All others go through autograd, and the
memory sums both.

A use asks in backward whether it may write to the sink. It may not if the gradient is for torch.autograd.grad, is
differentiated again, or is shown to the user's hooks, nor where the sum would differ from autograd's bits. In float32
the bits are the same, because uses are added in autograd's order. Gradients of half-precision weights are added in the
float32 in which they wait.
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
    """Open memory in which a parameter's gradient waits, for writing."""

    values: torch.Tensor
    """Memory of the gradient, in the parameter's shape and the dtype in which gradients wait."""
    is_empty: bool
    """Whether `values` has no content yet, so that every element must be written."""

    def add(self, rows: slice, gradient: torch.Tensor) -> None:
        """Add to consecutive rows; each row is added to once.

        Args:
            rows: rows in the first dimension.
            gradient: gradient of these rows, any float dtype.
        """
        if self.is_empty:
            self.values[rows].copy_(gradient)
        else:
            self.values[rows].add_(gradient)

    def add_rows(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add to some rows; the gradient of the others is zero.

        Args:
            rows: rows in the first dimension, int64 [num_rows], without repetitions.
            gradient: gradient of these rows, any float dtype, [num_rows, ...].
        """
        if self.is_empty:
            self.values.zero_()
        self.values.index_add_(0, rows, gradient.to(self.values.dtype))


class GradientSink(Protocol):
    """Takes the gradients of one parameter."""

    def expect(self, use: GradientUse) -> None:
        """Expect one more use that delivers directly, if it may then; held by a weak reference."""

    def is_open(self) -> bool:
        """Return whether a use may deliver directly. Called from: backward."""

    def put(self, gradient: torch.Tensor) -> None:
        """Take a use's whole gradient: any float dtype and strides, the parameter's shape; read only."""

    def write(self) -> AbstractContextManager[GradientPlace] | None:
        """Open the memory for a use's whole gradient; None where it must be given to `put`."""


class GradientUse:
    """One use of a parameter in the graph, from forward to backward.

    Args:
        param: the parameter, a leaf that requires a gradient.
        sink: the parameter's sink.
    """

    def __init__(self, param: torch.Tensor, sink: GradientSink) -> None:
        self._param = param
        with torch._C.DisableTorchFunction():  # looking at the graph is not a use of the parameter
            self._accumulation = get_gradient_edge(param).node
        self.sink = sink
        self._last_pass: int | None = None
        sink.expect(self)

    def may_run(self) -> bool:
        """Return whether the running pass may have run or may still run this use. Called from: backward.

        It cannot if an earlier pass did and freed its part of the graph.
        """
        return self._last_pass in (None, torch._C._current_graph_task_id())

    def is_open(self) -> bool:
        """Return whether its gradient may bypass autograd. Called from: this use's own backward."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._last_pass = torch._C._current_graph_task_id()
        if torch.is_grad_enabled() or self._param._backward_hooks or not self.sink.is_open():
            return False
        try:
            return torch._C._will_engine_execute_node(self._accumulation)
        except RuntimeError:  # torch.autograd.grad wants this gradient
            return False


def attach_sink(param: torch.Tensor, sink: GradientSink) -> None:
    """Make the uses of a parameter deliver their gradients to a sink."""
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
    """Announce a use of a tensor in forward, outside any autograd function.

    Args:
        param: a tensor.

    Returns:
        The use; None if the tensor has no sink or gets no gradient.
    """
    sink = sink_of(param)
    if sink is None or not param.requires_grad or not torch.is_grad_enabled() or param._backward_hooks:
        return None
    return GradientUse(param, sink)
