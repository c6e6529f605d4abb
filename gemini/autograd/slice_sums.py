"""Sums of parameter gradients over the slices of one batch, while a block runs slice after slice.

Sums over backward passes are gemini.gradients'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["SliceSums", "summand"]


class SliceSums:
    """Gradients of one block's parameters, summed over slices while open."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[nn.Parameter, torch.Tensor]] | None = None

    @property
    def is_open(self) -> bool:
        """Whether arriving gradients belong to a slice."""
        return self._sums is not None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Collect gradients while the context is open; sums that were not taken by its end are dropped."""
        self._sums = {}
        try:
            yield
        finally:
            self._sums = None

    def add(self, param: nn.Parameter) -> None:
        """Move `param.grad` into the parameter's sum, in float32 for half precision."""
        assert self._sums is not None
        grad, param.grad = param.grad, None
        assert grad is not None
        grad = grad.to_dense() if grad.is_sparse else grad
        if id(param) in self._sums:
            self._sums[id(param)][1].add_(grad)
        else:
            self._sums[id(param)] = (param, summand(grad))

    def take(self, param: nn.Parameter) -> torch.Tensor | None:
        """Return a parameter's sum, rounded once to its dtype; None if no slice has given it a gradient."""
        assert self._sums is not None
        entry = self._sums.pop(id(param), None)
        return None if entry is None else entry[1].to(param.dtype)

    def take_all(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Return the parameters whose sums have not been taken, with their sums as from `take`."""
        assert self._sums is not None
        return [(param, total.to(param.dtype)) for param, total in self._sums.values()]


def summand(grad: torch.Tensor) -> torch.Tensor:
    """Return a gradient to which others may be added in place: in float32 for half precision."""
    return grad.float() if grad.dtype.itemsize < 4 else grad
