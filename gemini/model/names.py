"""Names of a model's parameters and buffers."""

from __future__ import annotations

import re

import torch

from gemini.model.plain_names import named_buffers, named_modules, named_params

__all__ = ["canonical_buffers", "canonical_names", "persistent_buffers", "plain_name"]

_WRAPPED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""Parts that peft adds to the names of modules that it wraps."""


def plain_name(name: str) -> str:
    """Return the name that a weight had before peft wrapped modules; names of adapters are unchanged."""
    return _WRAPPED.sub("", f".{name}").removeprefix(".")


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Return for each name of each parameter, those of tied ones included, the first name of that parameter."""
    first = {id(param): name for name, param in named_params(model)}
    return {name: first[id(param)] for name, param in named_params(model, remove_duplicate=False)}


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong in a state dict, by name; a buffer of several modules has its first name."""
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
