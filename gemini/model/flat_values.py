"""Flat values of a parameter, of which any run can be read without the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["FlatPiece", "FlatValues"]


class FlatValues(Protocol):
    """Values in row-major order: a tensor of one dimension, or an object that reads them on demand."""

    def __getitem__(self, run: slice, /) -> torch.Tensor:
        """Return elements [run.start, run.stop), 1D on the CPU; read only."""


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """Consecutive elements of some values; nothing is read before it is needed."""

    values: FlatValues
    begin: int
    """Index of the first element among `values`."""

    def __getitem__(self, run: slice, /) -> torch.Tensor:
        """Return elements [run.start, run.stop) of the piece."""
        return self.values[self.begin + run.start : self.begin + run.stop]
