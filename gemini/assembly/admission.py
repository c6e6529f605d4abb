"""Which models an engine takes: those whose parameters are theirs alone and hold their own values.

Changes by other libraries are recognised by the names of their classes and attributes; none of the libraries is
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from gemini.errors import ConfigError, ModelError
from gemini.model.parameter_kinds import check_kind
from gemini.weights.ownership import refuse_owned

__all__ = ["admit", "refuse_foreign"]

_WRAPPERS = {
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "pass its .module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "pass its .module",
    ("torch.distributed.fsdp", "FullyShardedDataParallel"): "build the model without FSDP",
    ("torch.distributed.fsdp", "FSDPModule"): "build the model without fully_shard",
    ("torch.distributed._composable.replicate_with_fsdp", "ReplicateModule"): "build the model without replicate",
    ("deepspeed", "DeepSpeedEngine"): "pass its .module, built without deepspeed.zero.Init",
    ("deepspeed", "PipelineModule"): "build the model without DeepSpeed",
    ("fairscale", "FullyShardedDataParallel"): "build the model without FSDP",
    ("fairscale", "ShardedDataParallel"): "pass its .module",
}
"""Classes that share or move the parameters below them, by a package and a name, and what to do instead."""
_MOVING_HOOKS = frozenset({"AlignDevicesHook", "CpuOffload", "LayerwiseCastingHook"})
"""Hooks of accelerate that move or cast the weights or inputs of their module."""
_MOVING_DIFFUSERS_HOOKS = ("offload", "casting")
"""Parts of the names of hooks of diffusers that move or cast the weights of their module."""
_LOAD_PLAINLY = (
    "load it without device_map, or remove the hooks with accelerate.hooks.remove_hook_from_submodules(model), "
    "before GeminiDDP(...), which moves weights itself; weights that were on disk are then on the meta device: "
    "give weights=DIRECTORY too"
)


def admit(model: object, *, has_weights: bool) -> None:
    """Make sure that an engine may take a model over; changes nothing.

    Args:
        model: what the user gave.
        has_weights: whether a checkpoint will give the parameters their values.

    Raises:
        ConfigError: it is no torch.nn.Module.
        ModelError: an engine, or another library, manages its parameters; a parameter is of a kind that chunks cannot
            hold; or parameters on the meta device have their values in files that another library knows.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"GeminiDDP: expected a torch.nn.Module, got {type(model).__name__}")
    refuse_foreign(model, has_weights=has_weights)


def refuse_foreign(model: torch.nn.Module, *, has_weights: bool) -> None:
    """Refuse a model that an engine or another library manages, or with parameters that chunks cannot hold.

    Args:
        model: on any device.
        has_weights: whether a checkpoint will give the parameters their values.

    Raises:
        ModelError: it is one; names the module or parameter, and what to do.
    """
    refuse_owned(model)
    modules = list(model.named_modules())
    for name, module in modules:
        _refuse_wrapper(_named(name), module)
    for name, module in sorted(modules, key=lambda item: _num_values(item[1]), reverse=True):
        _refuse_hooks(_named(name), module)
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            raise ModelError(
                f"parameter {name} is managed by DeepSpeed (it has a ds_id), which keeps its values elsewhere: "
                "build the model outside deepspeed.zero.Init and without HfDeepSpeedConfig"
            )
        if not torch.nn.parameter.is_lazy(param):
            check_kind(name, param)
    if not has_weights:
        _refuse_values_elsewhere(model)


def _named(module_name: str) -> str:
    return f"module {module_name}" if module_name else "the model"


def _num_values(module: torch.nn.Module) -> tuple[int, int]:
    """Return how many parameters a module holds on meta, and in all: the more, the more it says when it is named."""
    params = [param for param in module._parameters.values() if param is not None]
    return sum(param.is_meta for param in params), len(params)


def _refuse_wrapper(what: str, module: torch.nn.Module) -> None:
    contract = sys.modules.get("torch.distributed._composable.contract")
    if contract is not None and "replicate" in (contract._get_registry(module) or ()):
        raise ModelError(
            f"{what} was given to torch's replicate, which averages its gradients over ranks: use zero.shard instead"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{what} is a TorchScript module, whose parameters Python cannot replace: wrap the module that it was "
            "scripted or traced from, and use torch.compile for speed"
        )
    for kind in type(module).__mro__:
        for (package, class_name), remedy in _WRAPPERS.items():
            if kind.__name__ == class_name and _is_of(kind, package):
                raise ModelError(
                    f"{what} is a {class_name} of {kind.__module__.partition('.')[0]}, which manages the parameters "
                    f"below it: {remedy}; for several ranks use zero.shard(model, config)"
                )


def _refuse_hooks(what: str, module: torch.nn.Module) -> None:
    for hook in _flattened(getattr(module, "_hf_hook", None)):
        for kind in type(hook).__mro__:
            if kind.__name__ in _MOVING_HOOKS and _is_of(kind, "accelerate"):
                raise ModelError(
                    f"{what} has a hook of accelerate ({kind.__name__}), which moves its weights or its inputs at "
                    f"each forward: {_LOAD_PLAINLY}"
                )
    for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", None) or {}:
        if any(part in str(name) for part in _MOVING_DIFFUSERS_HOOKS):
            raise ModelError(
                f"{what} has a hook of diffusers ({name}), which moves or casts its weights at each forward: build the "
                "model without it; GeminiDDP(...) moves weights itself"
            )


def _refuse_values_elsewhere(model: torch.nn.Module) -> None:
    """Refuse parameters on meta that were loaded, by transformers or diffusers, to somewhere else."""
    for module_name, module in model.named_modules():
        if not getattr(module, "hf_device_map", None):
            continue
        for name, param in module.named_parameters(prefix=module_name):
            if param.is_meta:
                raise ModelError(
                    f"parameter {name} is on the meta device and its values, by the model's hf_device_map, were left "
                    "on disk when it was loaded: load the model without device_map, or give GeminiDDP(..., "
                    "weights=DIRECTORY) or load_pretrained the checkpoint's directory"
                )


def _flattened(hook: Any) -> Iterator[Any]:
    """Yield a hook of accelerate, or those that it is a sequence of."""
    inner = getattr(hook, "hooks", None)
    if isinstance(inner, (list, tuple)):
        for each in inner:
            yield from _flattened(each)
    elif hook is not None:
        yield hook


def _is_of(kind: type, package: str) -> bool:
    return f"{kind.__module__}.".startswith(f"{package}.")
