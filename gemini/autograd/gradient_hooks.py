"""Hooks on parameters: for gradients that autograd has accumulated, and sinks for those that bypass autograd."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from gemini.autograd.events import RuntimeEvents
from gemini.autograd.gradient_sink import GradientPlace, GradientUse, attach_sink, detach_sink
from gemini.autograd.shared_uses import SharedUses
from gemini.autograd.slice_sums import SliceSums
from gemini.model.tensor_parallel import is_dtensor

__all__ = ["GradientHooks"]


class GradientHooks:
    """The hooks on the trainable parameters of one engine; `remove` removes them.

    Args:
        events: receives gradients.
        sums: take the gradients that arrive while they are open.
    """

    def __init__(self, events: RuntimeEvents, sums: SliceSums) -> None:
        self.uses = SharedUses()
        """Parameters whose gradients may bypass autograd; functions with parameters are called through it."""
        self._events = events
        self._sums = sums
        self._handles: list[Any] = []
        self._sinks: dict[torch.nn.Parameter, _Sink] = {}

    def install(
        self, params: Sequence[torch.nn.Parameter], *, num_names: Mapping[int, int], unseen: Collection[int]
    ) -> None:
        """Attach the hooks.

        Args:
            params: trainable parameters.
            num_names: number of names that the model has for each parameter, by its id.
            unseen: ids of parameters that compiled code may use without announcing it.
        """
        # torch keeps these where the garbage collector cannot follow, so they must not keep the engine alive.
        events_ref = weakref.ref(self._events)
        sums = self._sums

        def take_gradient(param: torch.nn.Parameter) -> None:
            with torch._C.DisableTorchFunctionSubclass():
                has_gradient = param.grad is not None
                if has_gradient and sums.is_open:
                    sums.add(param)
                    return
                events = events_ref()
                assert events is not None, "the engine is gone but its graph is not"
                if has_gradient:
                    events.take_gradient(param)
                else:  # no node of the graph had a gradient, but perhaps a sink did
                    events.finish_gradient(param)

        for param in params:
            handle = param.register_post_accumulate_grad_hook(take_gradient)  # type: ignore[no-untyped-call]
            self._handles.append(handle)
            if is_dtensor(param):  # its gradient may have to be summed over ranks first
                continue
            self._sinks[param] = sink = _Sink(param, self._events, sums)
            attach_sink(param, sink)
        for param, sink in self._sinks.items():
            if num_names[id(param)] > 1:
                self.uses.sinks[id(param)] = sink
                sink.has_other_uses = id(param) in unseen

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for param in self._sinks:
            detach_sink(param)
        self._sinks.clear()


class _Sink:
    """Delivers gradients of one parameter's uses to the runtime; see [Note: Gradients past autograd].

    It is closed while slices of a batch are being summed, and for a parameter that has also been used in other ways,
    because autograd must add those gradients in its own order.
    """

    def __init__(self, param: torch.nn.Parameter, events: RuntimeEvents, sums: SliceSums) -> None:
        # The graph keeps sinks where the garbage collector cannot follow.
        self._param_ref, self._events_ref = weakref.ref(param), weakref.ref(events)
        self._sums = sums
        self._uses: weakref.WeakSet[GradientUse] = weakref.WeakSet()  # uses in graphs that still exist
        self.num_announced = 0
        self.has_other_uses = False

    def expect(self, use: GradientUse) -> None:
        self._uses.add(use)
        self.num_announced += 1
        self._events().expect_gradient(self._param())

    def is_open(self) -> bool:
        if self.has_other_uses or self._sums.is_open:
            return False
        num_uses = sum(use.may_run() for use in self._uses)
        return self._events().takes_gradients_apart(self._param(), num_uses)

    def put(self, gradient: torch.Tensor) -> None:
        self._events().put_gradient(self._param(), gradient)

    def write(self) -> AbstractContextManager[GradientPlace] | None:
        return self._events().write_gradient(self._param())

    def _events(self) -> RuntimeEvents:
        events = self._events_ref()
        assert events is not None, "the engine is gone but its graph is not"
        return events

    def _param(self) -> torch.nn.Parameter:
        param = self._param_ref()
        assert param is not None, "the parameter is gone but its graph is not"
        return param
