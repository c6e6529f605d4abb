"""Module and autograd hooks that turn torch's events into calls on the runtime. No policy here.

Hooks are on the modules of units and on the model itself. So the user may call the model, a method such as `generate`,
or the engine; all calls pass through here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gemini.autograd.events import RuntimeEvents
from gemini.autograd.gradient_hooks import GradientHooks
from gemini.autograd.managed_parameter import hide, is_placeless, show
from gemini.autograd.slice_sums import SliceSums
from gemini.autograd.tracers import check_untraced
from gemini.errors import ModelError
from gemini.model.forward_inputs import cast_floats
from gemini.model.module_calls import disable_compile, is_called_within_itself, is_compiled
from gemini.model.outputs import map_tensors, tensors_in

__all__ = ["HookSet"]

_LOOKUPS = (torch.nn.Embedding, torch.nn.EmbeddingBag)


class HookSet:
    """All hooks of one engine; `remove` removes them.

    Args:
        events: receives all events.
        input_dtype: dtype to which the outermost forward's floating-point tensors are cast; None: they are not cast.
    """

    def __init__(self, events: RuntimeEvents, input_dtype: torch.dtype | None = None) -> None:
        # - What is told
        self._events = events
        self._input_dtype = input_dtype
        # - The hooks
        self._handles: list[Any] = []
        self._owners: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        self.slice_sums = SliceSums()
        """Sums that take the gradients that arrive while they are open."""
        self.gradients = GradientHooks(events, self.slice_sums)
        """Hooks on parameters."""
        # - What is running
        self._depth = 0
        self._entered: list[int] = []
        self._hidden_by: dict[int, list[torch.nn.Parameter]] = {}
        """Parameters of code compiled by torch.compile, which must not see their class while it runs: by unit, or 0 for
        the model."""

    def install(
        self,
        root: torch.nn.Module,
        unit_modules: dict[int, torch.nn.Module],
        params: list[torch.nn.Parameter],
    ) -> None:
        """Attach the hooks.

        Args:
            root: the user's model.
            unit_modules: module of each unit except the root's.
            params: trainable parameters.
        """
        compiled_units = {
            unit_id for unit_id, module in unit_modules.items() if any(map(is_compiled, module.modules()))
        }
        self._hidden_by = {unit_id: list(unit_modules[unit_id].parameters()) for unit_id in compiled_units}
        if is_compiled(root):
            self._hidden_by[0] = list(root.parameters())
        self._owners = [
            (module, name, param)
            for module in root.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self._handles.append(root.register_forward_pre_hook(self._before_model, prepend=True, with_kwargs=True))
        self._handles.append(root.register_forward_hook(self._after_model, always_call=True))
        for unit_id, module in unit_modules.items():
            # A lookup's backward needs the rows that were looked up, but no weights.
            before, after = self._unit_hooks(unit_id, reads_weights=type(module) not in _LOOKUPS)
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        unwatched = [unit_modules[unit_id] for unit_id in compiled_units]
        unwatched += [module for module in root.modules() if is_compiled(module)]
        self.gradients.install(
            params,
            num_names=Counter(id(param) for _, _, param in self._owners),
            unseen={id(param) for module in unwatched for param in module.parameters()},
        )

    @property
    def is_running(self) -> bool:
        """Whether the model or a unit of it is running."""
        return self._depth > 0 or bool(self._entered)

    def abort(self) -> None:
        """Undo what an interrupted forward has begun; torch runs no hooks for a KeyboardInterrupt."""
        if (not self._depth and not self._entered) or not self._events.access.is_ours:
            return
        self._depth = 0
        self._entered.clear()
        for unit_id in self._hidden_by:
            self._show(unit_id)
        self._events.abort_forward()
        self._events.access.release()

    @contextmanager
    def recomputing(self, unit_id: int) -> Iterator[None]:
        """Keep a unit's weights usable in backward while the context is open, and fetch what comes next."""
        try:
            self._enter_unit(unit_id)
        except BaseException:
            self._release()
            raise
        try:
            yield
        finally:
            self._leave_unit(unit_id)

    def num_updates_of(self, unit_id: int) -> int:
        """Return how often the optimizer has changed a unit's weights."""
        return self._events.num_updates_of(unit_id)

    def hand_over(self, param: torch.nn.Parameter) -> None:
        """Give the complete gradient in `param.grad` to the runtime."""
        self._events.take_gradient(param)

    def remove(self) -> None:
        """Remove all hooks."""
        self.abort()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.gradients.remove()

    # The hooks below are kept out of torch.compile's graphs: a compiled block runs between them.

    @disable_compile
    def _before_model(self, module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._events.access.claim("a forward")
        check_untraced()
        if self._depth == 0 or not is_called_within_itself(module):
            self.abort()
            self._events.access.claim("a forward")
        if self._depth == 0:
            self._check_owners()
            self.gradients.uses.is_model_trained = torch.is_grad_enabled()
            self._note_moment("enter", 0)
            self._events.begin_forward(sum(tensor.numel() for tensor in tensors_in((args, kwargs))))
            self._hide(0)
        self._depth += 1
        if self._depth == 1 and self._input_dtype is not None:
            inputs: tuple[Any, Any] = cast_floats(self._input_dtype, (args, kwargs))
            return inputs
        return None

    @disable_compile
    def _after_model(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._depth == 0 or not self._events.access.is_ours:  # the pre-hook failed before it had begun anything
            self._release()
            return None
        self._depth -= 1
        if self._depth:
            return None
        self.gradients.uses.is_model_trained = False
        self._show(0)
        output = self._events.wrap_outputs(self._own_outputs(output))
        self._events.end_forward()
        self._note_moment("leave", 0)
        self._release()
        return output

    def _enter_unit(self, unit_id: int) -> None:
        self._events.access.claim("a forward")
        check_untraced()
        self._events.enter_unit(unit_id)
        self._note_moment("enter", unit_id)
        self._entered.append(unit_id)
        self._hide(unit_id)

    def _leave_unit(self, unit_id: int) -> None:
        self._show(unit_id)
        self._entered.pop()
        self._note_moment("leave", unit_id)
        self._events.exit_unit(unit_id)
        self._release()

    def _release(self) -> None:
        """Release the engine for other threads if no part of it is running in this thread."""
        if not self._depth and not self._entered and self._events.access.is_ours:
            self._events.access.release()

    def _unit_hooks(self, unit_id: int, *, reads_weights: bool) -> tuple[Callable[..., None], Callable[..., Any]]:
        @disable_compile
        def before(module: torch.nn.Module, args: Any) -> None:
            self._enter_unit(unit_id)

        @disable_compile
        def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
            if not self._entered or self._entered[-1] != unit_id or not self._events.access.is_ours:
                self._release()
                return None  # the pre-hook failed before it had entered the unit
            output = self._own_outputs(output)
            self._leave_unit(unit_id)
            self._watch_backward(unit_id, output, reads_weights=reads_weights)
            return output

        return before, after

    def _note_moment(self, kind: str, unit_id: int) -> None:
        self._events.moments.note(kind, unit_id)

    def _check_owners(self) -> None:
        """Refuse parameters that were replaced by others, because these would be neither fetched nor trained."""
        for module, name, param in self._owners:
            if module._parameters.get(name) is not param:
                raise ModelError(
                    f"parameter {name} of a {type(module).__name__} was replaced after GeminiDDP(...), which "
                    "manages the one it found; change the model before wrapping it; call "
                    "torch.func.functional_call, which replaces parameters temporarily, on a plain copy of it"
                )

    def _hide(self, unit_id: int) -> None:
        for param in self._hidden_by.get(unit_id, ()):
            hide(param)

    def _show(self, unit_id: int) -> None:
        for param in self._hidden_by.get(unit_id, ()):
            show(param)

    def _watch_backward(self, unit_id: int, output: Any, *, reads_weights: bool) -> None:
        """Report that backward is about to run a unit.

        transformers checkpoints `forward` inside `__call__`: its recomputation uses the weights and fires no hook.
        """
        if not torch.is_grad_enabled():
            return

        def reached(gradient: torch.Tensor) -> None:
            self._events.enter_backward(unit_id, reads_weights=reads_weights)
            self._note_moment("backward", unit_id)

        def watch(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.requires_grad:
                tensor.register_hook(reached)  # type: ignore[no-untyped-call]
            return tensor

        map_tensors(watch, output)

    def _own_outputs(self, output: Any) -> Any:
        """Copy outputs that are views of borrowed weights, because the memory will soon hold other weights."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if is_placeless(tensor) or self._events.is_borrowed(tensor) else tensor

        return own(output) if isinstance(output, torch.Tensor) else map_tensors(own, output)
