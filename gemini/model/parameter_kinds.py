"""The kinds of parameters that chunks can hold: dense tensors of plain bytes only."""

from __future__ import annotations

import torch
from torch import nn

from gemini.errors import ModelError
from gemini.model.tensor_parallel import is_dtensor, local_part

__all__ = ["check_kind", "is_cast_dtype"]

_CAST_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_KEPT_DTYPES = frozenset(
    {
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool),
    }
)
_TAKEN_OVER = ("__torch_function__", "__torch_dispatch__", "to", "cuda", "cpu", "data")
"""Attributes whose definition shows that a subclass computes with its values or moves them itself."""
_DEQUANTIZE = (
    "dequantize it, or load the model without its quantization; weights of 8 bits or fewer work as frozen "
    "integer or float8 parameters of your own modules, with their scales as separate parameters"
)


def is_cast_dtype(dtype: torch.dtype) -> bool:
    """Return whether weights of a dtype are cast to the working dtype; others, float8 included, keep theirs."""
    return dtype in _CAST_DTYPES


def check_kind(name: str, param: torch.Tensor) -> None:
    """Refuse a parameter whose values are not the plain bytes of one dense tensor.

    Args:
        name: the parameter's fully qualified name, for messages.
        param: a parameter with a shape, on any device, "meta" included; not changed.

    Raises:
        ModelError: it is a tensor subclass such as a quantised weight, sparse, nested, or has a dtype that chunks
            cannot hold.
    """
    if _is_subclass(param):
        kind = type(param)
        raise ModelError(
            f"parameter {name} is a {kind.__name__} ({kind.__module__}), whose values do not lie in one plain tensor: "
            f"expected a torch.nn.Parameter or a DTensor; {_DEQUANTIZE}"
        )
    local = local_part(param)
    if local.is_quantized:
        raise ModelError(
            f"parameter {name} has dtype {param.dtype}, whose scales are stored beside its bytes: {_DEQUANTIZE}"
        )
    if local.layout is not torch.strided or local.is_nested:
        kind_of_layout = "a nested tensor" if local.is_nested else f"of layout {local.layout}"
        raise ModelError(
            f"parameter {name} is {kind_of_layout}: expected a dense tensor; convert it, as with to_dense(), before "
            "wrapping the model"
        )
    dtype = param.dtype
    if dtype.is_complex:
        raise ModelError(
            f"parameter {name} has dtype {dtype}: expected a real dtype; store it as two real "
            "parameters or with torch.view_as_real"
        )
    if dtype not in _CAST_DTYPES and dtype not in _KEPT_DTYPES:
        raise ModelError(
            f"parameter {name} has dtype {dtype}: expected a floating-point dtype of 8 bits or more, an integer dtype "
            "of whole bytes, or bool; keep its bytes in a parameter of torch.uint8 and view them as they are used"
        )
    if param.requires_grad and not is_cast_dtype(dtype):
        raise ModelError(
            f"parameter {name} is trainable with dtype {dtype}: expected a floating-point dtype of 16 bits or more; "
            "freeze it with requires_grad_(False) or convert it"
        )


def _is_subclass(param: torch.Tensor) -> bool:
    """Return whether a parameter's class does more with its values than torch's own parameters do."""
    kind = type(param)
    if kind in (nn.Parameter, torch.Tensor):
        return False
    if is_dtensor(param):
        return type(local_part(param)) not in (torch.Tensor, nn.Parameter)
    if nn.Parameter not in kind.__mro__ or type(param.data) is not torch.Tensor:
        return True
    own_classes = kind.__mro__[: kind.__mro__.index(nn.Parameter)]
    return any(attribute in vars(each) for each in own_classes for attribute in _TAKEN_OVER)
