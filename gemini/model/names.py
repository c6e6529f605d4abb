"""Names of a model's parameters, buffers and modules, as a checkpoint has them.

A *plain* name is the one in a model's own state dict. `torch.distributed.algorithms._checkpoint.checkpoint_wrapper`
puts a module around another one and removes its own name from state dicts. This package does the same everywhere: a
model has the same names before and after such wrapping. A *canonical* name is the first of those that a tied parameter
or shared buffer has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

__all__ = [
    "canonical_buffers",
    "canonical_names",
    "name_without_adapters",
    "name_without_wrappers",
    "named_buffers",
    "named_modules",
    "named_params",
    "persistent_buffers",
]

_ADAPTED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""Parts that peft adds to the names of modules that it wraps."""
_WRAPPER = "_checkpoint_wrapped_module"
"""Attribute under which a wrapper holds the module that it wraps."""


def name_without_wrappers(name: str) -> str:
    """Return a parameter's, buffer's or module's name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER) if _WRAPPER in name else name


def named_params(model: torch.nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters as `named_parameters` does, by plain name."""
    for name, param in model.named_parameters(remove_duplicate=remove_duplicate):
        yield name_without_wrappers(name), param


def named_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield buffers by plain name, under all of their names."""
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name_without_wrappers(name), buffer


def named_modules(model: torch.nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield modules as torch does, by plain name; a wrapper and its module share a name, and the module comes last."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield name_without_wrappers(name), module


def name_without_adapters(name: str) -> str:
    """Return the name that a weight had before peft wrapped modules; names of adapters are unchanged."""
    return _ADAPTED.sub("", f".{name}").removeprefix(".")


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
