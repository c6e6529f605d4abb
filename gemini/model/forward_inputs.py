"""Casts a model's inputs to the dtype in which it computes."""

from __future__ import annotations

from typing import Any

import torch

from gemini.model.outputs import map_tensors
from gemini.model.parameter_kinds import is_cast_dtype

__all__ = ["cast_floats"]


def cast_floats(dtype: torch.dtype, inputs: Any) -> Any:
    """Cast floating-point tensors, as FSDP2 does with `cast_forward_inputs`; gradients come back in their own dtype.

    Args:
        dtype: dtype for tensors of bfloat16, float16, float32 and float64; all others stay.
        inputs: tensors, in containers as for `map_tensors`; not changed.

    Returns:
        The same structure; tensors that already have the dtype are the same objects.
    """
    return map_tensors(lambda tensor: tensor.to(dtype) if is_cast_dtype(tensor.dtype) else tensor, inputs)
