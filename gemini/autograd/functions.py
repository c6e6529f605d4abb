"""The effect of torch's functions on the values of their arguments.

`__torch_function__` is told every function that a weight is given to: operators, methods, and the getters and setters
of properties. Most of them read values and need no entry here. This module knows the others.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "FunctionKind",
    "copied_arguments",
    "kind_of",
    "reshapes_in_place",
    "returns_new_tensors",
    "written_arguments",
]


class FunctionKind(enum.Enum):
    """What a function needs from a weight."""

    VALUES = "values"
    """Reads or writes the values: nearly every function."""
    METADATA = "metadata"
    """Reads shape, dtype, device, hooks or flags; needs no values."""
    GEOMETRY = "geometry"
    """Reads strides and offsets, which the placeholder of an absent weight does not have."""
    ADDRESS = "address"
    """Gives the memory to code that bypasses torch's functions."""
    DATA_GET = "data get"
    DATA_SET = "data set"
    GRAD_GET = "grad get"
    GRAD_SET = "grad set"
    DIFFERENTIATE = "differentiate"
    """Differentiates with respect to the weight, and runs user code meanwhile."""


_PROPERTIES = {"data": (FunctionKind.DATA_GET, FunctionKind.DATA_SET), "grad": (FunctionKind.GRAD_GET,) * 2}
_VALUE_PROPERTIES = frozenset({"T", "mT", "H", "mH", "real", "imag", "_base"})
_METADATA = frozenset(
    {
        *("__len__", "size", "dim", "numel", "ndimension", "nelement", "element_size", "__hash__"),
        *("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "is_same_size"),
        *("requires_grad_", "retain_grad", "register_hook", "register_post_accumulate_grad_hook", "get_device"),
        *("dim_order", "is_shared", "is_pinned", "is_set_to", "is_coalesced", "has_names", "_is_view"),
        *("result_type", "can_cast", "ones_like", "zeros_like", "empty_like", "rand_like", "randn_like", "full_like"),
        *("randint_like", "new_empty", "new_zeros", "new_ones", "new_full", "_dimI", "_dimV"),
    }
)
_GEOMETRY = frozenset({"stride", "is_contiguous", "storage_offset", "is_non_overlapping_and_dense"})
_ADDRESS = frozenset(
    {
        *("data_ptr", "untyped_storage", "storage", "_typed_storage", "storage_type", "numpy", "__array__"),
        *("__dlpack__", "__array_wrap__", "__cuda_array_interface__", "const_data_ptr", "mutable_data_ptr"),
    }
)
_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
) | {"__setitem__"}
_NOT_IN_PLACE = frozenset({"requires_grad_", "retain_grad_"})

_NEW_TENSORS = frozenset(
    {
        *(F.linear, F.layer_norm, F.group_norm, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.addmm),
        *(torch.mm, torch.bmm, torch.nn.functional.embedding, torch.nn.functional.rms_norm, torch.mul, torch.add),
        *(torch.Tensor.matmul, torch.Tensor.mul, torch.Tensor.add, torch.Tensor.mm, torch.Tensor.addmm),
    }
)
"""Frequent functions whose results never share memory with a weight."""

_RENORMALISING = {F.embedding: 3, F.embedding_bag: 4}
"""Functions that write to their second argument, a table, if `max_norm` is given, with the position of `max_norm`."""

_WITH_STATISTICS = frozenset({F.batch_norm, F.instance_norm})
"""Functions that write to the running statistics, their second and third argument."""
_RESHAPING = frozenset(
    {
        *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "as_strided_", "resize_"),
        *("resize_as_", "share_memory_", "requires_grad_"),
    }
)


@lru_cache(maxsize=4096)
def kind_of(func: Any) -> FunctionKind:
    """Return what a torch function needs from a weight."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute in _PROPERTIES:
            return _PROPERTIES[attribute][name != "__get__"] if attribute == "data" else _grad_kind(name)
        return FunctionKind.VALUES if attribute in _VALUE_PROPERTIES else FunctionKind.METADATA
    if func is torch.autograd.grad or func is torch.autograd.backward:
        return FunctionKind.DIFFERENTIATE
    for names, kind in (
        (_METADATA, FunctionKind.METADATA),
        (_GEOMETRY, FunctionKind.GEOMETRY),
        (_ADDRESS, FunctionKind.ADDRESS),
    ):
        if name in names:
            return kind
    return FunctionKind.VALUES


def _grad_kind(name: str) -> FunctionKind:
    return FunctionKind.GRAD_GET if name == "__get__" else FunctionKind.GRAD_SET


def returns_new_tensors(func: Any) -> bool:
    """Return whether results are known to share no memory with arguments; for most functions this is not known."""
    return func in _NEW_TENSORS


@lru_cache(maxsize=4096)
def _is_in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "").partition(".")[0]  # name without the overload, such as in aten.mul_.Tensor
    if name in _IN_PLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE


@lru_cache(maxsize=4096)
def _has_mutable_schema(func: Any) -> bool:
    """Return whether an operator of torch.ops declares that it writes an argument."""
    overloads = [getattr(func, name) for name in func.overloads()] if hasattr(func, "overloads") else [func]
    return any(getattr(getattr(each, "_schema", None), "is_mutable", False) for each in overloads)


def reshapes_in_place(func: Any) -> bool:
    """Return whether a function changes a tensor's shape, strides, storage or flags rather than its values."""
    return getattr(func, "__name__", "") in _RESHAPING


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments, tensors or lists of them, that a call may write, so that old values have to be kept."""
    written = [] if kwargs.get("out") is None else [kwargs["out"]]
    if _is_in_place(func) or kwargs.get("inplace"):
        written.append(args[0] if args else next(iter(kwargs.values()), None))
    if _has_mutable_schema(func):
        return [*args, *kwargs.values()]
    if func in _WITH_STATISTICS:
        written += [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
    if func in _RENORMALISING:
        place = _RENORMALISING[func]
        if kwargs.get("max_norm") is not None or (len(args) > place and args[place] is not None):
            written.append(args[1] if len(args) > 1 else kwargs.get("weight"))
    return written


def copied_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Return, for a call that copies values into all elements of tensors, each tensor and what is copied into it."""
    source = args[1] if len(args) > 1 else kwargs.get("src", kwargs.get("other"))
    if func is torch.Tensor.copy_:
        return [(args[0], source)]
    if func is torch._foreach_copy_ and isinstance(source, (list, tuple)):
        return list(zip(args[0], source, strict=True))
    if func is torch.Tensor.__setitem__ and (args[1] is Ellipsis or args[1] == slice(None)):
        return [(args[0], args[2])]
    return []
