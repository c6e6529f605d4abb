"""Which engine manages a parameter: each knows its runtime, from when it is wrapped until the engine is closed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from gemini.chunk.layout import ParamSlot
from gemini.errors import ModelError
from gemini.guards import OptimizerGuard
from gemini.runtime import Runtime
from gemini.tracers import refuse_scripting

__all__ = ["check_unchanged", "disown", "is_trained_by_engine", "own", "refuse_owned", "runtime_of"]

_OWNER_ATTRIBUTE = "_gemini_runtime"
_SCRIPTED = "__prepare_scriptable__"
"""What torch.jit.script calls."""


def runtime_of(param: torch.Tensor) -> Runtime | None:
    """Return the runtime that manages a parameter, None if none does."""
    runtime: Runtime | None = getattr(param, _OWNER_ATTRIBUTE, None)
    return runtime


def is_trained_by_engine(param: torch.Tensor) -> bool:
    """Return whether an engine keeps a parameter's gradient and updates it."""
    runtime = runtime_of(param)
    slot = None if runtime is None else runtime.slot_of(param)
    return slot is not None and slot.spec.is_trainable


_guard = OptimizerGuard(is_trained_by_engine, lambda optimizer: getattr(optimizer, "knows_engines", False))


def own(model: torch.nn.Module, runtime: Runtime) -> None:
    """Let a runtime manage all parameters of a model, and refuse other optimizers of them."""
    _guard.install()
    model.__dict__[_SCRIPTED] = partial(refuse_scripting, model)
    for param in model.parameters():
        setattr(param, _OWNER_ATTRIBUTE, runtime)


def disown(model: torch.nn.Module, runtime: Runtime) -> None:
    """Let nobody manage those that the runtime has managed; idempotent."""
    model.__dict__.pop(_SCRIPTED, None)
    for param in model.parameters():
        if runtime_of(param) is runtime:
            delattr(param, _OWNER_ATTRIBUTE)


def refuse_owned(model: torch.nn.Module) -> None:
    """Raise ModelError if an engine manages some parameters already."""
    for name, param in model.named_parameters():
        if runtime_of(param) is not None:
            raise ModelError(
                f"parameter {name} is managed by another GeminiDDP; close() that one first, or wrap a copy of the model"
            )


def check_unchanged(model: torch.nn.Module, runtime: Runtime, slots: Mapping[str, ParamSlot]) -> None:
    """Make sure that a model has the parameters that were wrapped, no others and no fewer.

    Args:
        model: the wrapped one.
        runtime: its engine's.
        slots: where the parameters are, by canonical name.

    Raises:
        ModelError: the model was changed since; what is saved would not be the model.
    """
    params = dict(model.named_parameters())
    changed = [name for name in slots if name not in params]
    for name, param in params.items():
        if runtime_of(param) is not runtime or name not in slots or param.shape != slots[name].spec.full_shape:
            changed.append(name)
    if changed:
        raise ModelError(
            f"parameter {changed[0]} was added, removed, replaced or resized after the model was wrapped, of which the "
            "engine knows nothing: undo that, or change the model before GeminiDDP(...)"
        )
