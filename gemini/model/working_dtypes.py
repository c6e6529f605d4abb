"""The dtype of each parameter and buffer of a model, for a given working dtype.

[Note: What a cast changes]
Floating-point parameters of 16 bits or more get the working dtype; integers, bools and float8 keep theirs. In half
precision some stay float32, as in transformers' `from_pretrained(dtype=...)`: those that a module's
`_keep_in_fp32_modules_strict` names, or for float16 alone `_keep_in_fp32_modules`, and those that are float32 in a
transformers model built in the working dtype. Any module may have these attributes.

A buffer follows the parameters next to it: those of its module, else of the smallest enclosing module that has some.
Where these are cast and the buffer has the dtype that they had, it is cast with them, or stays float32 as above. Where
some already have the working dtype, the model was cast before, and its buffers have their intended dtypes. Where no
transformers model decides, a float32 buffer that is not persistent stays: rotary tables are of this kind, and code
computes them in float32. Persistent ones, such as the statistics of BatchNorm, are treated as weights.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gemini.model.names import name_without_adapters, name_without_wrappers
from gemini.model.parameter_kinds import is_cast_dtype

__all__ = ["WorkingDtypes", "choose_dtypes"]

logger = logging.getLogger(__name__)

_HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class WorkingDtypes:
    """Dtypes of a model's tensors while an engine manages it."""

    params: Mapping[str, torch.dtype]
    """Dtypes of parameters, by each one's first name."""
    buffers: Mapping[str, torch.dtype]
    """Dtypes of buffers, by each one's first name."""


def choose_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> WorkingDtypes:
    """Choose the dtype of every parameter and buffer; see [Note: What a cast changes].

    Args:
        model: the user's model, on any device, "meta" included; only read.
        dtype: the working dtype: bfloat16, float16 or float32.

    Returns:
        The dtypes, including those that do not change.
    """
    is_half = dtype in _HALF_DTYPES
    as_built = dict(_dtypes_as_built(model, dtype)) if is_half else {}
    float32_names = set(_names_kept_in_float32(model, dtype)) if is_half else set()
    names_of: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(param), []).append(name)
    params = {}
    for name, param in model.named_parameters():
        is_kept = not float32_names.isdisjoint(names_of[id(param)]) or as_built.get(name) is torch.float32
        own = torch.float32 if is_kept else dtype
        params[name] = own if is_cast_dtype(param.dtype) else param.dtype
    followed = _Neighbours(model, params, dtype)
    buffers = {}
    for name, buffer in model.named_buffers():
        buffers[name] = buffer.dtype
        if not followed.are_cast_from(buffer.dtype, name):
            continue
        if name in float32_names:
            buffers[name] = torch.float32
        elif name in as_built:
            buffers[name] = as_built[name]
        elif buffer.dtype is not torch.float32 or _is_persistent(model, name):
            buffers[name] = dtype
    return WorkingDtypes({name_without_wrappers(name): found for name, found in params.items()}, buffers)


class _Neighbours:
    """Finds out how the parameters next to each buffer are cast.

    Args:
        model: the user's model.
        params: dtype of each parameter, by its first name.
        dtype: the working dtype; parameters with another do not count.
    """

    def __init__(self, model: torch.nn.Module, params: Mapping[str, torch.dtype], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._own: dict[str, set[torch.dtype]] = {}
        self._below: dict[str, set[torch.dtype]] = {}
        first = {id(param): name for name, param in model.named_parameters()}
        for name, param in model.named_parameters(remove_duplicate=False):
            if params[first[id(param)]] is not dtype:
                continue
            owner = name.rpartition(".")[0]
            self._own.setdefault(owner, set()).add(param.dtype)
            for around in _modules_around(owner):
                self._below.setdefault(around, set()).add(param.dtype)

    def are_cast_from(self, dtype: torch.dtype, buffer_name: str) -> bool:
        """Return whether all parameters next to a buffer are cast, and some of them from this dtype."""
        owner = buffer_name.rpartition(".")[0]
        found = self._own.get(owner)
        if found is None:
            found = next((self._below[each] for each in _modules_around(owner) if each in self._below), set())
        return dtype in found and self._dtype not in found


def _modules_around(name: str) -> list[str]:
    """Return a module's name and those of the modules around it, the model's own, "", last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _is_persistent(model: torch.nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key not in model.get_submodule(owner)._non_persistent_buffers_set


def _tensor_names(module: torch.nn.Module) -> Iterator[str]:
    for name, _ in module.named_parameters(remove_duplicate=False):
        yield name
    for name, _ in module.named_buffers(remove_duplicate=False):
        yield name


def _names_kept_in_float32(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[str]:
    """Yield the names that modules' own lists say stay float32, matched as transformers matches them."""
    attributes = ["_keep_in_fp32_modules_strict"]
    if dtype is torch.float16:
        attributes.append("_keep_in_fp32_modules")
    for module_name, module in model.named_modules():
        patterns = sorted({each for attribute in attributes for each in getattr(module, attribute, None) or ()})
        if not patterns:
            continue
        pattern = re.compile("|".join(f"(?:{each.replace('*', '.*')})" for each in patterns))
        for name in _tensor_names(module):
            if pattern.search(name_without_adapters(name_without_wrappers(name))):
                yield f"{module_name}.{name}" if module_name else name


def _dtypes_as_built(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.dtype]]:
    """Yield what transformers models have in them, by name, with its dtype in one that is built in `dtype`."""
    taken: tuple[str, ...] = ()
    for module_name, module in model.named_modules():
        is_inside = any(not each or module_name == each or module_name.startswith(f"{each}.") for each in taken)
        if is_inside or not callable(getattr(type(module), "_from_config", None)):
            continue
        taken += (module_name,)
        built = _build_on_meta(module, dtype)
        for name in _tensor_names(module) if built else ():
            if (found := built.get(name_without_adapters(name_without_wrappers(name)))) is not None:
                yield (f"{module_name}.{name}" if module_name else name), found


def _build_on_meta(module: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Build another model of a transformers model's class and return its tensors' dtypes; empty if that fails."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            warnings.simplefilter("ignore")
            built = type(module)._from_config(copy.deepcopy(module.config), dtype=dtype)
    except Exception as error:  # a user's own class may need more than a configuration
        logger.debug("%s cannot be built from its configuration alone: %s", type(module).__name__, error)
        return {}
    tensors = [*built.named_parameters(remove_duplicate=False), *built.named_buffers(remove_duplicate=False)]
    return {name: tensor.dtype for name, tensor in tensors}
