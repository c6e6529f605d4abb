"""The module tree of a model as plain data, for packing and unit rules.

Reads modules and parameters once and keeps neither tensors nor modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from gemini.errors import ModelError
from gemini.model.names import named_params
from gemini.model.parameter_kinds import check_kind, is_cast_dtype
from gemini.model.params import ParamSpec
from gemini.model.tensor_parallel import local_part, split_of

__all__ = ["ModuleNode", "ModuleTree", "ParamEntry", "compiled_layers", "describe_model", "unwrap_compiled"]

_CONTAINER_TYPES = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_ATOMIC_TYPES = (nn.MultiheadAttention, torch.jit.ScriptModule)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNode:
    """One module object; a module reachable under several names is one node at its first name."""

    name: str
    """Fully qualified name; "" is the model. For a compiled module, the name of the outer wrapper."""
    class_name: str
    """Name of its class; for a compiled module, the class inside the wrapper."""
    child_names: tuple[str, ...]
    """Nodes of its children in order; a child shared with an earlier parent has another prefix."""
    param_names: tuple[str, ...]
    """Parameters it holds directly, by canonical name, in order."""
    is_called: bool
    """Whether its class has a forward, so that hooks on it run; a ModuleList has none."""
    is_container: bool
    """Whether it is a ModuleList, ModuleDict or Sequential, or derives from one."""
    is_atomic: bool
    """Whether it uses its children's parameters without calling the children, so that dividing it gains nothing."""
    is_compiled: bool
    """Whether it is a torch.compile wrapper, together with the module inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamEntry:
    """One parameter and its other names in the model."""

    spec: ParamSpec
    aliases: tuple[str, ...]
    """Further names of the same parameter (tied weights, shared modules), in module order."""


@dataclass(frozen=True)
class ModuleTree:
    """All modules and parameters of a model, in module order."""

    nodes: tuple[ModuleNode, ...]
    """Every module once, parents before children; the first is the model."""
    params: tuple[ParamEntry, ...]
    """Every parameter once, in `named_parameters` order."""
    no_split_classes: frozenset[str] = frozenset()
    """Class names that a module of the model lists in `_no_split_modules`."""

    @cached_property
    def node_by_name(self) -> dict[str, ModuleNode]:
        """Modules by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def spec_by_name(self) -> dict[str, ParamSpec]:
        """Parameters by canonical name."""
        return {entry.spec.name: entry.spec for entry in self.params}


def describe_model(
    model: nn.Module, *, working_dtype: torch.dtype, dtypes: Mapping[str, torch.dtype] | None = None
) -> ModuleTree:
    """Describe a model's modules and parameters.

    Args:
        model: the user's model, on any device, "meta" included; only read.
        working_dtype: dtype for floating-point parameters of 16 bits or more; others keep theirs.
        dtypes: dtype of each parameter by its first name, where it differs from that rule; None: the rule holds for
            all.

    Returns:
        The tree as plain data.

    Raises:
        ModelError: a parameter is not initialised yet, is of a kind that chunks cannot hold (see `check_kind`), or is
            divided unevenly among ranks.
    """
    params = _describe_params(model, working_dtype, dtypes or {})
    canonical_name = {id(param): name for name, param in named_params(model)}
    modules, name_by_id = _unique_modules(model)
    nodes = []
    for name, module in modules:
        inner = unwrap_compiled(module)
        nodes.append(
            ModuleNode(
                name=name,
                class_name=_class_name(inner),
                child_names=tuple(name_by_id[id(child)] for child in inner.children()),
                param_names=tuple(canonical_name[id(param)] for param in inner.parameters(recurse=False)),
                is_called="forward" in vars(inner) or type(inner).forward is not nn.Module.forward,
                is_container=isinstance(inner, _CONTAINER_TYPES),
                is_atomic=isinstance(inner, _ATOMIC_TYPES),
                is_compiled=inner is not module,
            )
        )
    return ModuleTree(
        nodes=tuple(nodes),
        params=params,
        no_split_classes=_no_split_classes(module for _, module in modules),
    )


def compiled_layers(module: nn.Module) -> list[nn.Module]:
    """Return a module and, where it is a torch.compile wrapper, what it wraps, outermost first."""
    layers = [module]
    while (wrapped := layers[-1]._modules.get("_orig_mod")) is not None:
        layers.append(wrapped)
    return layers


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """Return the module inside a torch.compile wrapper, or the module itself."""
    return compiled_layers(module)[-1]


def _describe_params(
    model: nn.Module, working_dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]
) -> tuple[ParamEntry, ...]:
    names: dict[int, list[str]] = {}
    for name, param in named_params(model, remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    entries = []
    for index, (name, param) in enumerate(named_params(model)):
        _check_param(name, param)
        spec = ParamSpec(
            name=name,
            index=index,
            shape=tuple(local_part(param).shape),
            dtype=dtypes.get(name, working_dtype if is_cast_dtype(param.dtype) else param.dtype),
            is_trainable=param.requires_grad,
            split=split_of(name, param),
        )
        aliases = tuple(alias for alias in names[id(param)] if alias != name)
        entries.append(ParamEntry(spec=spec, aliases=aliases))
    return tuple(entries)


def _check_param(name: str, param: nn.Parameter) -> None:
    if nn.parameter.is_lazy(param):
        raise ModelError(
            f"parameter {name} has no shape yet: expected an initialised parameter, found "
            f"{type(param).__name__}; run one batch through the model before wrapping it"
        )
    check_kind(name, param)


def _unique_modules(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[int, str]]:
    """List (name, module) once each in preorder, and the node name of every module object, wrapped ones included."""
    modules: list[tuple[str, nn.Module]] = []
    name_by_id: dict[int, str] = {}
    stack = [("", "", model)]
    while stack:
        name, prefix, module = stack.pop()
        layers = compiled_layers(module)
        known_name = next((name_by_id[id(layer)] for layer in layers if id(layer) in name_by_id), None)
        name_by_id.update((id(layer), name if known_name is None else known_name) for layer in layers)
        if known_name is None:
            modules.append((name, module))
            prefix += "_orig_mod." * (len(layers) - 1)
            children = [(f"{prefix}{key}", f"{prefix}{key}.", child) for key, child in layers[-1].named_children()]
            stack.extend(reversed(children))
    return modules, name_by_id


def _class_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return type(module).__name__


def _no_split_classes(modules: Iterable[nn.Module]) -> frozenset[str]:
    names: set[str] = set()
    for module in modules:
        listed = getattr(unwrap_compiled(module), "_no_split_modules", None)
        names.update([listed] if isinstance(listed, str) else listed or ())
    return frozenset(names)
