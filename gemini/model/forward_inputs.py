"""What a model is given, in the dtype it computes in."""

from __future__ import annotations

from typing import Any

import torch

from gemini.model.outputs import map_tensors
from gemini.model.parameter_kinds import is_cast_dtype

__all__ = ["cast_floats"]


def cast_floats(dtype: torch.dtype, inputs: Any) -> Any:
    """Cast floating-point tensors, as FSDP2 does with `cast_forward_inputs`; gradients come back in their own dtype.

    Args:
        dtype: for tensors of bfloat16, float16, float32 and float64; all others stay.
        inputs: tensors, in containers as of `map_tensors`; not changed.

    Returns:
        The same structure; tensors that have the dtype already are the same objects.
    """
    return map_tensors(lambda tensor: tensor.to(dtype) if is_cast_dtype(tensor.dtype) else tensor, inputs)
