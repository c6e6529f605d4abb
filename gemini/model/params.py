"""Facts about a parameter that do not need its values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemini.model.tensor_parallel import TensorSplit

__all__ = ["ParamSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """Description of one parameter for packing."""

    name: str
    """Fully qualified name: the first one in `named_parameters`."""
    index: int
    """Position in the model's parameter order."""
    shape: tuple[int, ...]
    """Shape of the part that this rank holds."""
    dtype: torch.dtype
    """Dtype of the working weight."""
    is_trainable: bool
    split: TensorSplit | None = None
    """Division of the parameter under tensor parallelism; None if this rank holds all of it."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.shape if self.split is None else self.split.full_shape(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for extent in self.shape:
            numel *= extent
        return numel
