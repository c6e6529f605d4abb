"""The names a model's parameters and buffers go by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from gemini.chunk.layout import ParamSlot
from gemini.chunk.plain_names import named_buffers, named_modules, named_params
from gemini.errors import CheckpointMismatchError
from gemini.extra_states import compare_extra_states

__all__ = ["canonical_buffers", "canonical_names", "compare_names", "persistent_buffers", "plain_name"]

_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What peft puts into the names of modules that it wraps."""


def plain_name(name: str) -> str:
    """Return a name as it was before peft wrapped modules on the way; names of adapters stay as they are."""
    return _WRAPPED.sub("", f".{name}").removeprefix(".")


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Return for each name of each parameter, those of tied ones included, the first name of that parameter."""
    first = {id(param): name for name, param in named_params(model)}
    return {name: first[id(param)] for name, param in named_params(model, remove_duplicate=False)}


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong into a state dict, by name; of one that several modules have its first."""
    buffers = dict(named_buffers(model))
    return {name: buffers[name] for name in canonical_buffers(model).values()}


def canonical_buffers(model: torch.nn.Module) -> dict[str, str]:
    """Return for each name of each persistent buffer, in all modules that have it, its first name."""
    first: dict[int, str] = {}
    return {
        (full := f"{module_name}.{name}" if module_name else name): first.setdefault(id(buffer), full)
        for module_name, module in named_modules(model, remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def compare_names(
    model: torch.nn.Module, slots: Mapping[str, ParamSlot], state_dict: Mapping[str, Any], *, strict: bool
) -> tuple[list[str], list[str], CheckpointMismatchError | None]:
    """Compare a state dict with what a model's engine holds.

    Args:
        model: the wrapped one.
        slots: where its parameters are, by name.
        state_dict: to be loaded.
        strict: whether names must match exactly.

    Returns:
        Missing names, unexpected names, and why the rest cannot be loaded, if it cannot.
    """
    params = canonical_names(model)
    buffers = dict(named_buffers(model))
    canonical = params | canonical_buffers(model)
    given = {canonical.get(name, name) for name in state_dict}
    expected = dict.fromkeys(canonical.values())
    extra = compare_extra_states(model, state_dict)
    missing = [name for name in expected if name not in given] + extra.missing
    unexpected = [
        name for name in state_dict if name not in params and name not in buffers and name not in extra.loadable
    ]
    if strict and (missing or unexpected):
        what = f"load_state_dict: missing {missing}, unexpected {unexpected}"
        return missing, unexpected, CheckpointMismatchError(what)
    for name, value in state_dict.items():
        if name in unexpected or name in extra.loadable:
            continue
        shape = slots[params[name]].spec.full_shape if name in params else buffers[name].shape
        if not isinstance(value, torch.Tensor):
            what = f"load_state_dict: {name} is a {type(value).__name__}, expected a tensor of shape {tuple(shape)}"
            return missing, unexpected, CheckpointMismatchError(what)
        if tuple(value.shape) != tuple(shape):
            what = f"load_state_dict: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}"
            return missing, unexpected, CheckpointMismatchError(what)
    return missing, unexpected, None
