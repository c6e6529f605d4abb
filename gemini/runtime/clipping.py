"""The global norm of a step's gradients, and the factor that clips them. Nothing is scaled here: the update does it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from gemini.errors import ModelError

__all__ = ["Clipping"]


class Clipping:
    """Clipping requested since the last update."""

    def __init__(self) -> None:
        self.factor = 1.0
        """Factor for all current gradients; 1.0 if they are not clipped."""

    def norm_of(self, sums: Mapping[str, float], names: Iterable[str], *, loss_scale: float) -> float:
        """Return the exact L2 norm of some gradients as they are clipped so far.

        The sum over parameters is correctly rounded, so it depends neither on their order nor on the layout.

        Args:
            sums: of squares, by parameter; those without a gradient are not there.
            names: the parameters that count.
            loss_scale: what the gradients carry.

        Returns:
            The norm; NaN if a gradient is not finite.
        """
        values = [sums[name] for name in names if name in sums]
        if not all(map(math.isfinite, values)):
            return math.nan
        return math.sqrt(math.fsum(values)) / loss_scale * self.factor

    def clip(self, norm: float, max_norm: float) -> None:
        """Clip gradients of this norm to at most `max_norm`, as torch's clip_grad_norm_ does."""
        self.factor *= min(1.0, max_norm / (norm + 1e-6))

    def check_open(self) -> None:
        """Raise ModelError if gradients have been clipped, so that none may be added."""
        if self.factor != 1.0:
            raise ModelError(
                "a gradient arrived after clip_grad_norm_, whose factor would apply to it too: clip once, after the "
                "last backward before optimizer.step()"
            )
