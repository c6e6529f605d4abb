"""Lets the wrapped model's own `state_dict` show weights in place of placeholders, and refuses its loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gemini.errors import ModelError

__all__ = ["install_state_hooks"]


def install_state_hooks(
    module: torch.nn.Module, named_parameters: Callable[[], Iterator[tuple[str, torch.Tensor]]]
) -> tuple[Any, Any]:
    """Install both hooks.

    Args:
        module: the wrapped model.
        named_parameters: yields copies of all its parameters, by name.

    Returns:
        Their handles.
    """

    def fill(_: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, tensor in named_parameters():
            if prefix + name in state:
                state[prefix + name] = tensor

    def refuse(*_: Any) -> None:
        raise ModelError(
            "load_state_dict on a wrapped model would miss the weights that are away and the masters of all "
            "others; call engine.load_state_dict"
        )

    on_saving = module.register_state_dict_post_hook(fill)  # type: ignore[no-untyped-call]
    on_loading = module.register_load_state_dict_pre_hook(refuse)  # type: ignore[no-untyped-call]
    return on_saving, on_loading
