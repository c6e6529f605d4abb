"""State of modules other than parameters and buffers: torch's `get_extra_state` and `set_extra_state`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gemini.model.names import named_modules

__all__ = ["ExtraStateNames", "compare_extra_states", "extra_states", "load_extra_states", "takers_of_extra_state"]

_SUFFIX = "_extra_state"
"""Last part of the name of such a state in a state dict."""


@dataclass(frozen=True, slots=True)
class ExtraStateNames:
    """Comparison of a state dict with the modules that take extra state."""

    missing: list[str]
    """Names of modules that take extra state and get none."""
    loadable: frozenset[str]
    """Names that a module of the model takes."""


def extra_states(model: torch.nn.Module, *, remove_duplicate: bool = False) -> dict[str, Any]:
    """Return the result of each module's `get_extra_state`, by its name in a state dict.

    Args:
        model: any model.
        remove_duplicate: whether only the first name of a module counts.

    Returns:
        The results unchanged; nothing is copied.
    """
    found: dict[torch.nn.Module, Any] = {}
    for _, module in _overriding(model, "get_extra_state", remove_duplicate=True):
        found[module] = module.get_extra_state()
    names = _overriding(model, "get_extra_state", remove_duplicate=remove_duplicate)
    return {name: found[module] for name, module in names}


def takers_of_extra_state(model: torch.nn.Module, *, remove_duplicate: bool = False) -> dict[str, torch.nn.Module]:
    """Return the modules that have a `set_extra_state`, by its name in a state dict; arguments as `extra_states`."""
    return dict(_overriding(model, "set_extra_state", remove_duplicate=remove_duplicate))


def compare_extra_states(model: torch.nn.Module, state_dict: Mapping[str, Any]) -> ExtraStateNames:
    """Compare a state dict with what modules take; for a module with several names one of them is enough."""
    takers = takers_of_extra_state(model)
    given = {takers[name] for name in state_dict if name in takers}
    missing = {module: name for name, module in reversed(takers.items()) if module not in given}
    return ExtraStateNames(missing=list(reversed(missing.values())), loadable=frozenset(takers))


def load_extra_states(model: torch.nn.Module, states: Mapping[str, Any]) -> None:
    """Give modules their extra state; names that no module takes are ignored.

    Args:
        model: the model whose modules are set.
        states: extra states by name in a state dict, among other entries.
    """
    for name, module in takers_of_extra_state(model).items():
        if name in states:
            module.set_extra_state(states[name])


def _overriding(
    model: torch.nn.Module, method: str, *, remove_duplicate: bool
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules whose class overrides one of torch's methods, by name in a state dict."""
    for name, module in named_modules(model, remove_duplicate=remove_duplicate):
        if getattr(type(module), method, None) is not getattr(torch.nn.Module, method):
            yield (f"{name}.{_SUFFIX}" if name else _SUFFIX), module
