"""Refuses code that runs a model to record or transform it: tracers, exporters and function transforms.

[Note: Tracers]
A recording of an engine would contain weights at the addresses that they had for a moment, but not the hooks that fetch
them. Function transforms do not support hooks on saved tensors, which backward needs to find weights that have moved.
So both are refused where the engine's hooks begin, for any placement. Within a model's forward (attention masks are
made with vmap) the model may use them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from gemini.errors import ModelError

__all__ = ["check_untraced", "is_transforming", "outside_transforms", "refuse_scripting"]

_INSTEAD = (
    "the weights of a GeminiDDP come and go while it runs; load engine.state_dict() into a plain copy of the model and "
    "{verb} that"
)


def is_transforming() -> bool:
    """Return whether one of torch.func's transforms is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Run code in the context as if no transform of torch.func were active."""
    message = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    with temporarily_clear_interpreter_stack():
        torch._C._autograd._saved_tensors_hooks_enable()
        try:
            yield
        finally:
            if message is not None:
                torch._C._autograd._saved_tensors_hooks_disable(message)


def check_untraced() -> None:
    """Raise ModelError if the call that begins is recorded or transformed rather than run."""
    if is_transforming():
        raise ModelError(
            "torch.func (grad, vmap, jvp, jacrev, vjp, functionalize) over a GeminiDDP: transforms do not work with "
            "weights that come and go; call torch.autograd.grad, or torch.autograd.functional.jacobian or jvp, which "
            "do, or load engine.state_dict() into a plain copy of the model and transform that"
        )
    if torch._C._is_tracing():
        raise _refusal("torch.jit.trace", "trace")
    if torch.compiler.is_exporting():
        raise _refusal("torch.export", "export")
    if torch.fx._symbolic_trace.is_fx_symbolic_tracing() or _is_making_fx():
        raise _refusal("torch.fx (symbolic_trace, make_fx)", "trace")


def refuse_scripting(module: Any) -> NoReturn:
    """Raise ModelError; torch.jit.script calls this on the objects it is given and on their members."""
    raise _refusal("torch.jit.script", "script")


def _is_making_fx() -> bool:
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


def _refusal(tracer: str, verb: str) -> ModelError:
    return ModelError(f"{tracer} of a GeminiDDP: {_INSTEAD.format(verb=verb)}")
