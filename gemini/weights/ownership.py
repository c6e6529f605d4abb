"""Registers which engine manages a parameter, from wrapping until the engine is closed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from gemini.autograd.guards import OptimizerGuard
from gemini.autograd.managed_parameter import manage, release, weight_of
from gemini.autograd.tracers import refuse_scripting
from gemini.chunk.layout import ParamPlace
from gemini.errors import ModelError
from gemini.model.names import named_params
from gemini.runtime.runtime import Runtime
from gemini.weights.access import ParamWeight, WeightAccess

__all__ = [
    "SHOWN_ATTRIBUTE",
    "check_unchanged",
    "disown",
    "is_shown",
    "is_trained_by_engine",
    "own",
    "refuse_owned",
    "runtime_of",
]

SHOWN_ATTRIBUTE = "_gemini_shown"
_SCRIPTED = "__prepare_scriptable__"
"""Attribute that torch.jit.script calls."""


def runtime_of(param: torch.Tensor) -> Runtime | None:
    """Return the runtime that manages a parameter, None if none does."""
    weight = weight_of(param)
    return weight.access.runtime if isinstance(weight, ParamWeight) and weight.param is param else None


def is_trained_by_engine(param: torch.Tensor) -> bool:
    """Return whether an engine keeps a parameter's gradient and updates it."""
    runtime = runtime_of(param)
    place = None if runtime is None else runtime.place_of(param)
    return place is not None and place.spec.is_trainable


_guard = OptimizerGuard(is_trained_by_engine, lambda optimizer: getattr(optimizer, "knows_engines", False))


def own(model: torch.nn.Module, access: WeightAccess) -> None:
    """Register an engine for all parameters of its model, and refuse other optimizers for them."""
    _guard.install()
    model.__dict__[_SCRIPTED] = partial(refuse_scripting, model)
    for weight in access.weights:
        manage(weight.param, weight)


def disown(model: torch.nn.Module, access: WeightAccess) -> None:
    """Unregister the engine's parameters; idempotent."""
    model.__dict__.pop(_SCRIPTED, None)
    for weight in access.weights:
        if weight_of(weight.param) is weight:
            release(weight.param)


def is_shown(model: torch.nn.Module) -> bool:
    """Return whether plain tensors replace a wrapped model's parameters now, so that it can save itself."""
    return SHOWN_ATTRIBUTE in vars(model)


def refuse_owned(model: torch.nn.Module) -> None:
    """Raise ModelError if an engine already manages some of the parameters."""
    for name, param in named_params(model):
        runtime = runtime_of(param)
        if runtime is not None and runtime.is_closed:
            raise ModelError(
                f"parameter {name} holds no values: the GeminiDDP that managed it was closed and could not hand them "
                "back; load the model anew"
            )
        if runtime is not None:
            raise ModelError(
                f"parameter {name} is managed by another GeminiDDP; close() that one first, or wrap a copy of the model"
            )


def check_unchanged(model: torch.nn.Module, runtime: Runtime, places: Mapping[str, ParamPlace]) -> None:
    """Check that a model has exactly the parameters that were wrapped.

    Args:
        model: the wrapped model.
        runtime: the runtime of its engine.
        places: places of the parameters, by canonical name.

    Raises:
        ModelError: the model was changed since wrapping, so a save would not represent it.
    """
    params = dict(named_params(model))
    changed = [name for name in places if name not in params]
    for name, param in params.items():
        if runtime_of(param) is not runtime or name not in places or param.shape != places[name].spec.full_shape:
            changed.append(name)
    if changed:
        raise ModelError(
            f"parameter {changed[0]} was added, removed, replaced or resized after the model was wrapped, which "
            "the engine cannot follow: undo the change, or make it before GeminiDDP(...)"
        )
