"""A parameter's values, flat, of which any run can be had without the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["FlatPiece", "FlatValues"]


class FlatValues(Protocol):
    """Values in row-major order: a tensor of one dimension, or something that reads them when asked."""

    def __getitem__(self, run: slice, /) -> torch.Tensor:
        """Return elements [run.start, run.stop), 1D on the CPU; read only."""


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """Consecutive ones of some values; nothing is read before it is asked for."""

    values: FlatValues
    begin: int
    """The first one's place among `values`."""

    def __getitem__(self, run: slice, /) -> torch.Tensor:
        """Return elements [run.start, run.stop) of the piece."""
        return self.values[self.begin + run.start : self.begin + run.stop]
