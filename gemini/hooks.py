"""Module and autograd hooks that turn what torch does into calls on the runtime. No policy here.

Hooks sit on the modules of units and on the model itself, so that the user may call the model, a method such as
`generate`, or the engine; all come through here.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from gemini.errors import ModelError
from gemini.outputs import map_tensors
from gemini.sliced_call import GradientSums

__all__ = ["HookSet", "RuntimeEvents"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_CALL_CODE = torch.nn.Module._call_impl.__code__


def _disable_compile(function: _Function) -> _Function:
    """Keep a hook out of torch.compile's graphs."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]


class RuntimeEvents(Protocol):
    """What the hooks tell."""

    def begin_forward(self) -> None:
        """Handle the start of the outermost forward of the model."""

    def end_forward(self) -> None:
        """Handle the end of the outermost forward, by return or exception."""

    def abort_forward(self) -> None:
        """Undo what a forward that was interrupted has begun."""

    def enter_unit(self, unit_id: int) -> None:
        """Make a unit's weights usable and keep them until `exit_unit`."""

    def exit_unit(self, unit_id: int) -> None:
        """Give back what `enter_unit` took."""

    def enter_backward(self, unit_id: int) -> None:
        """Make a unit's weights usable: backward has reached its outputs."""

    def num_updates_of(self, unit_id: int) -> int:
        """Return how often the optimizer has changed a unit's weights."""

    def use_parameter(self, param: torch.nn.Parameter) -> None:
        """Make one parameter usable until the unit, or the model, that is running ends."""

    def take_gradient(self, param: torch.nn.Parameter) -> None:
        """Take the gradient autograd has just accumulated into `param.grad`."""

    def is_borrowed(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor lies in memory that will be refilled with other weights."""

    def wrap_outputs(self, output: Any) -> Any:
        """Prepare what the model returns for backward (loss scaling)."""


class HookSet:
    """All hooks of one engine; `remove` takes them off.

    Args:
        events: told of everything.
    """

    def __init__(self, events: RuntimeEvents) -> None:
        self.slice_sums = GradientSums()
        """Takes the gradients that arrive while it is open."""
        self._events = events
        self._handles: list[Any] = []
        self._owners: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        self._mode = _ForeignUseMode(events)
        self._depth = 0
        self._entered: list[int] = []
        self._compiled_units: set[int] = set()
        self._is_model_compiled = False

    def install(
        self,
        root: torch.nn.Module,
        unit_modules: dict[int, torch.nn.Module],
        params: list[torch.nn.Parameter],
    ) -> None:
        """Put the hooks on.

        Args:
            root: the user's model.
            unit_modules: module of each unit but the root's.
            params: trainable parameters.
        """
        self._is_model_compiled = _is_compiled(root)
        self._compiled_units = {
            unit_id for unit_id, module in unit_modules.items() if any(map(_is_compiled, module.modules()))
        }
        self._owners = [
            (module, name, param)
            for module in root.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self._handles.append(root.register_forward_pre_hook(self._before_model, prepend=True))
        self._handles.append(root.register_forward_hook(self._after_model, always_call=True))
        for unit_id, module in unit_modules.items():
            before, after = self._unit_hooks(unit_id)
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        # torch keeps these where the garbage collector cannot follow, so they must not keep the engine alive.
        method = weakref.WeakMethod(self._events.take_gradient)
        sums = self.slice_sums

        def take_gradient(param: torch.nn.Parameter) -> None:
            if param.grad is None:  # a node of the graph had none to give
                return
            if sums.is_open:
                sums.add(param)
                return
            take = method()
            assert take is not None, "the engine is gone but its graph is not"
            take(param)

        for param in params:
            handle = param.register_post_accumulate_grad_hook(take_gradient)  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    def abort(self) -> None:
        """Undo what a forward that was interrupted has begun; torch runs no hooks for a KeyboardInterrupt."""
        if not self._depth and not self._entered:
            return
        self._depth = 0
        self._entered.clear()
        self._mode.reset()
        self._events.abort_forward()

    @contextmanager
    def recomputing(self, unit_id: int) -> Iterator[None]:
        """Keep a unit's weights usable in backward while the context is open, and fetch what comes next."""
        self._events.enter_unit(unit_id)
        self._entered.append(unit_id)
        self._watch()
        try:
            yield
        finally:
            self._mode.pause()
            self._entered.pop()
            self._events.exit_unit(unit_id)

    def num_updates_of(self, unit_id: int) -> int:
        """Return how often the optimizer has changed a unit's weights."""
        return self._events.num_updates_of(unit_id)

    def hand_over(self, param: torch.nn.Parameter) -> None:
        """Give the complete gradient in `param.grad` to the runtime."""
        self._events.take_gradient(param)

    def remove(self) -> None:
        """Take all hooks off."""
        self.abort()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # The hooks below are kept out of torch.compile's graphs: a compiled block runs between them.

    @_disable_compile
    def _before_model(self, module: torch.nn.Module, args: Any) -> None:
        if self._depth == 0 or not _is_called_within_itself(module):
            self.abort()
        if self._depth == 0:
            self._mode.pause()
            self._check_owners()
            self._events.begin_forward()
        self._depth += 1
        self._watch()

    @_disable_compile
    def _after_model(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._depth == 0:  # the pre-hook failed before it had begun anything
            return None
        self._depth -= 1
        if self._depth:
            return None
        self._mode.pause()
        output = self._events.wrap_outputs(self._own_outputs(output))
        self._events.end_forward()
        return output

    def _unit_hooks(self, unit_id: int) -> tuple[Callable[..., None], Callable[..., Any]]:
        @_disable_compile
        def before(module: torch.nn.Module, args: Any) -> None:
            self._mode.pause()  # first, or it would see the engine itself handle parameters
            self._events.enter_unit(unit_id)
            self._entered.append(unit_id)
            self._watch()

        @_disable_compile
        def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
            if not self._entered or self._entered[-1] != unit_id:
                return None  # the pre-hook failed before it had entered the unit
            self._mode.pause()
            output = self._own_outputs(output)
            self._entered.pop()
            self._events.exit_unit(unit_id)
            self._watch_backward(unit_id, output)
            self._watch()
            return output

        return before, after

    def _check_owners(self) -> None:
        """Refuse parameters that were replaced by others, which nobody would fetch or train."""
        for module, name, param in self._owners:
            if module._parameters.get(name) is not param:
                raise ModelError(
                    f"parameter {name} of a {type(module).__name__} was replaced after GeminiDDP(...), which manages "
                    "the one it found; change the model before wrapping it"
                )

    def _watch(self) -> None:
        """Catch foreign uses wherever user code runs next, unless that is a compiled graph or nothing of ours."""
        is_running = self._depth > 0 or bool(self._entered)
        is_compiled = self._is_model_compiled or (self._entered and self._entered[-1] in self._compiled_units)
        if is_running and not is_compiled:
            self._mode.resume()

    def _watch_backward(self, unit_id: int, output: Any) -> None:
        """Report when backward is about to run a unit.

        transformers checkpoints `forward` inside `__call__`: its recomputation uses the weights and fires no hook.
        """
        if not torch.is_grad_enabled():
            return

        def reached(gradient: torch.Tensor) -> None:
            self._events.enter_backward(unit_id)

        def watch(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.requires_grad:
                tensor.register_hook(reached)  # type: ignore[no-untyped-call]
            return tensor

        map_tensors(watch, output)

    def _own_outputs(self, output: Any) -> Any:
        """Copy outputs that are views of borrowed weights: the memory will hold other weights soon."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if self._events.is_borrowed(tensor) else tensor

        return own(output) if isinstance(output, torch.Tensor) else map_tensors(own, output)


class _ForeignUseMode(TorchFunctionMode):
    """Catches parameters used by code other than their unit's: a parent, or another unit, that reads them directly.

    Active while the model runs; every torch function is looked at, which costs a microsecond or two.

    Args:
        events: told of each parameter that a function is about to use.
    """

    _METADATA = frozenset(
        {"__set__", "size", "dim", "numel", "stride", "is_floating_point", "element_size", "ndimension"}
    )
    _VIEW_PROPERTIES = frozenset({"T", "mT", "H", "mH", "data"})
    """Properties that show the values; all others, such as `shape`, do not."""

    def __init__(self, events: RuntimeEvents) -> None:
        super().__init__()
        self._events = events
        self._is_active = False
        self._is_watching = False

    def resume(self) -> None:
        """Start catching."""
        self._is_watching = True
        if not self._is_active:
            self._is_active = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def pause(self) -> None:
        """Stop catching; the mode stays entered, and idle, beneath one the user has entered meanwhile."""
        self._is_watching = False
        depth = torch._C._len_torch_function_stack()
        if self._is_active and depth and torch._C._get_function_stack_at(depth - 1) is self:
            self._is_active = False
            self.__exit__(None, None, None)

    def reset(self) -> None:
        """Stop catching after an interruption, which autograd may have answered by taking the mode off itself."""
        self.pause()
        depth = torch._C._len_torch_function_stack()
        self._is_active = any(torch._C._get_function_stack_at(place) is self for place in range(depth))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_watching and self._reads_values(func):
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.nn.Parameter):
                    self._events.use_parameter(value)
                elif isinstance(value, (list, tuple)):
                    for item in value:
                        if isinstance(item, torch.nn.Parameter):
                            self._events.use_parameter(item)
        return func(*args, **kwargs)

    def _reads_values(self, func: Any) -> bool:
        if func.__name__ == "__get__":
            return getattr(func.__self__, "__name__", "") in self._VIEW_PROPERTIES
        return func.__name__ not in self._METADATA


def _is_compiled(module: torch.nn.Module) -> bool:
    """Return whether torch.compile runs a module, in either of its two forms."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _is_called_within_itself(module: torch.nn.Module) -> bool:
    """Return whether an outer call of a module that is being called is still running, rather than interrupted."""
    frame: FrameType | None = sys._getframe()
    num_calls = 0
    while frame is not None and num_calls < 2:
        num_calls += frame.f_code is _CALL_CODE and frame.f_locals["self"] is module
        frame = frame.f_back
    return num_calls == 2
