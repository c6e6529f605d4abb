"""Which engine manages a parameter: each knows its runtime, from when it is wrapped until the engine is closed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gemini.chunk.layout import ParamSlot
from gemini.chunk.plain_names import named_params
from gemini.errors import ModelError
from gemini.runtime import Runtime

__all__ = ["check_unchanged", "disown", "own", "refuse_owned", "runtime_of"]

_OWNER_ATTRIBUTE = "_gemini_runtime"


def runtime_of(param: torch.Tensor) -> Runtime | None:
    """Return the runtime that manages a parameter, None if none does."""
    runtime: Runtime | None = getattr(param, _OWNER_ATTRIBUTE, None)
    return runtime


def own(model: torch.nn.Module, runtime: Runtime) -> None:
    """Let a runtime manage all parameters of a model."""
    for param in model.parameters():
        setattr(param, _OWNER_ATTRIBUTE, runtime)


def disown(model: torch.nn.Module, runtime: Runtime) -> None:
    """Let nobody manage those that the runtime has managed; idempotent."""
    for param in model.parameters():
        if runtime_of(param) is runtime:
            delattr(param, _OWNER_ATTRIBUTE)


def refuse_owned(model: torch.nn.Module) -> None:
    """Raise ModelError if an engine manages some parameters already."""
    for name, param in named_params(model):
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
    params = dict(named_params(model))
    changed = [name for name in slots if name not in params]
    for name, param in params.items():
        if runtime_of(param) is not runtime or name not in slots or param.shape != slots[name].spec.full_shape:
            changed.append(name)
    if changed:
        raise ModelError(
            f"parameter {changed[0]} was added, removed, replaced or resized after the model was wrapped, of which the "
            "engine knows nothing: undo that, or change the model before GeminiDDP(...)"
        )
