"""What a model's own state dict calls its parameters and buffers: torch's wrappers of activations leave no trace there.

`torch.distributed.algorithms._checkpoint.checkpoint_wrapper` puts a module around another one and takes its own name
out of state dicts. So do we, everywhere: a model has the same names before and after it is wrapped so, in checkpoints
and saved weights too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["named_buffers", "named_modules", "named_params", "plain_name"]

_WRAPPED = "_checkpoint_wrapped_module"
"""What a wrapper calls the module that it wraps."""


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
    """Yield modules as torch does, by plain name: of a wrapper and what it wraps, which share one, the latter last."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield plain_name(name), module
