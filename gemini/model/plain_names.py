"""Names of parameters and buffers in a model's own state dict, without torch's wrappers of activations.

`torch.distributed.algorithms._checkpoint.checkpoint_wrapper` puts a module around another one and removes its own name
from state dicts. This package does the same everywhere: a model has the same names before and after such wrapping, in
checkpoints and saved weights too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["named_buffers", "named_modules", "named_params", "plain_name"]

_WRAPPED = "_checkpoint_wrapped_module"
"""Attribute under which a wrapper holds the module that it wraps."""


def plain_name(name: str) -> str:
    """Return a parameter's, buffer's or module's name without those of wrappers."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED) if _WRAPPED in name else name


def named_params(model: torch.nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters as `named_parameters` does, by plain name."""
    for name, param in model.named_parameters(remove_duplicate=remove_duplicate):
        yield plain_name(name), param


def named_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield buffers by plain name, under all of their names."""
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield plain_name(name), buffer


def named_modules(model: torch.nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield modules as torch does, by plain name; a wrapper and its module share a name, and the module comes last."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield plain_name(name), module
