"""Fills `state_dict` of the wrapped model and of every module in it with copies of weights; see docs/weights.md."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from gemini.autograd.managed_parameter import WeightCopy, weight_of
from gemini.errors import ModelError
from gemini.runtime.runtime import Runtime
from gemini.weights.access import ParamWeight
from gemini.weights.ownership import check_unchanged, is_shown
from gemini.weights.values import read_working

__all__ = ["install_state_hooks"]


def install_state_hooks(module: torch.nn.Module, runtime: Runtime) -> list[Any]:
    """Install hooks on a model and all modules in it.

    Args:
        module: the wrapped model.
        runtime: the runtime of its engine.

    Returns:
        The hooks' handles.
    """
    copies: dict[int, dict[int, torch.Tensor]] = {}  # by state dict in progress, then by parameter

    def fill(owner: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if owner is module and not is_shown(module):
            check_unchanged(module, runtime, runtime.layout.place_by_name)
        for name, param in owner._parameters.items():
            weight = weight_of(param)
            if not isinstance(weight, ParamWeight) or state.get(prefix + name, param) is param:  # keep_vars
                continue
            known = _copies_for(copies, state)
            if id(param) not in known:
                runtime.finish_updates()
                copy: WeightCopy = read_working(runtime, weight.place).as_subclass(WeightCopy)
                copy.what = f"{prefix + name} in a state dict"
                known[id(param)] = copy
            state[prefix + name] = known[id(param)]

    def refuse_assignment(owner: Any, state: Any, prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise ModelError(
                "load_state_dict(assign=True) on a model in a GeminiDDP would remove its parameters from their "
                "chunks: leave assign out, or call engine.load_state_dict"
            )

    handles: list[Any] = []
    for owner in module.modules():
        if owner._parameters or owner is module:
            handles.append(owner.register_state_dict_post_hook(fill))  # type: ignore[no-untyped-call]
            handles.append(owner.register_load_state_dict_pre_hook(refuse_assignment))  # type: ignore[no-untyped-call]
    return handles


def _copies_for(copies: dict[int, dict[int, torch.Tensor]], state: Any) -> dict[int, torch.Tensor]:
    """Return the copies that are in a state dict already, so that tied names share one."""
    if id(state) not in copies:
        try:
            weakref.finalize(state, copies.pop, id(state), None)
        except TypeError:  # a plain dict, whose end cannot be noticed
            return {}
        copies[id(state)] = {}
    return copies[id(state)]
