"""The names a model's parameters and buffers go by."""

from __future__ import annotations

import torch

__all__ = ["canonical_names", "persistent_buffers"]


def canonical_names(model: torch.nn.Module) -> dict[str, str]:
    """Return for each name of each parameter, those of tied ones included, the first name of that parameter."""
    first = {id(param): name for name, param in model.named_parameters()}
    return {name: first[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong into a state dict, by name."""
    return {
        f"{module_name}.{name}".strip("."): buffer
        for module_name, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
