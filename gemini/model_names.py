"""The names a model's parameters and buffers go by."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from gemini.chunk.layout import ParamSlot
from gemini.errors import CheckpointMismatchError

__all__ = ["canonical_buffers", "canonical_names", "compare_names", "persistent_buffers", "plain_name"]

_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What peft puts into the names of modules that it wraps."""


def plain_name(name: str) -> str:
    """Return a name as it was before peft wrapped modules on the way; names of adapters stay as they are."""
    return _WRAPPED.sub("", f".{name}").removeprefix(".")


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Return for each name of each parameter, those of tied ones included, the first name of that parameter."""
    first = {id(param): name for name, param in model.named_parameters()}
    return {name: first[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong into a state dict, by name; of a module that has several its first."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: buffers[name] for name in canonical_buffers(model).values()}


def canonical_buffers(model: torch.nn.Module) -> dict[str, str]:
    """Return for each name of each persistent buffer that by its module's first name."""
    first = {module: name for name, module in model.named_modules()}
    return {
        _join(module_name, name): _join(first[module], name)
        for module_name, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _join(module_name: str, name: str) -> str:
    return f"{module_name}.{name}" if module_name else name


def compare_names(
    model: torch.nn.Module, slots: Mapping[str, ParamSlot], state_dict: Mapping[str, torch.Tensor], *, strict: bool
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
    buffers = dict(model.named_buffers(remove_duplicate=False))
    canonical = params | canonical_buffers(model)
    given = {canonical.get(name, name) for name in state_dict}
    expected = dict.fromkeys(canonical.values())
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in state_dict if name not in params and name not in buffers]
    if strict and (missing or unexpected):
        what = f"load_state_dict: missing {missing}, unexpected {unexpected}"
        return missing, unexpected, CheckpointMismatchError(what)
    for name, value in state_dict.items():
        shape = slots[params[name]].spec.full_shape if name in params else getattr(buffers.get(name), "shape", ())
        if name not in unexpected and tuple(value.shape) != tuple(shape):
            what = f"load_state_dict: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}"
            return missing, unexpected, CheckpointMismatchError(what)
    return missing, unexpected, None
