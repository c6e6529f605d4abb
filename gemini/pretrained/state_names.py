"""Names of a model's parameters and buffers in its checkpoints, before transformers renames anything.

In a model with peft's adapters, the base model's weights have other names than in the base model, some of them exist
twice, and the adapters' own weights are not in its checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch

from gemini.model.names import canonical_buffers, name_without_adapters, named_modules, named_params

__all__ = ["base_model_of", "has_adapters", "state_names"]


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether a model is one that peft has put adapters into."""
    return bool(getattr(model, "peft_config", None)) and callable(getattr(model, "get_base_model", None))


def base_model_of(model: torch.nn.Module) -> Any:
    """Return the model to which the checkpoints belong: with adapters the one inside, otherwise the model itself."""
    model_with_adapters: Any = model
    return model_with_adapters.get_base_model() if has_adapters(model) else model


def state_names(model: torch.nn.Module) -> dict[str, list[str]]:
    """Return the names in the model of each weight or persistent buffer, by its name in the base model's state dict.

    Args:
        model: a model with or without adapters.

    Returns:
        Full names in the model, several where peft keeps a copy to be trained; without adapters' weights.
    """
    names = [*dict(named_params(model, remove_duplicate=False)), *canonical_buffers(model)]
    if not has_adapters(model):
        return {name: [name] for name in names}
    base = base_model_of(model)
    prefix = next(f"{name}." if name else "" for name, module in named_modules(model) if module is base)
    adapter_prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if name.startswith(prefix) and not any(part.startswith(adapter_prefix) for part in parts):
            found.setdefault(name_without_adapters(name.removeprefix(prefix)), []).append(name)
    return found
