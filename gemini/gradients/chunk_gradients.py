"""The gradients of one chunk: which have arrived, and which are still to come."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from gemini.chunk.layout import ChunkSpec
from gemini.kernels.pool import GradTicket
from gemini.offload.home import TiledHome
from gemini.tiers import MemoryTier

__all__ = ["GradChunk"]


@dataclass
class GradChunk:
    """The gradients of one chunk in the step under way."""

    spec: ChunkSpec
    home: TiledHome
    tier: MemoryTier
    sumsq: dict[int, GradTicket | torch.Tensor] = field(default_factory=dict)
    """Sum of squares of each gradient that has arrived, by position in the layout."""
    num_expected: Counter[int] = field(default_factory=Counter)
    """Uses of each parameter, by position, that will deliver their gradients by themselves and have not yet."""
    delivered: set[int] = field(default_factory=set)
    """Positions of which this backward pass has delivered something."""
    arrived: set[int] = field(default_factory=set)
    """Those of them of which something has reached host memory."""
    earlier: set[int] = field(default_factory=set)
    """Positions of which earlier backward passes have delivered something since the last update."""
    unfinished: set[int] = field(default_factory=set)
    """Positions of which uses have delivered by themselves, perhaps not all that this backward pass runs."""
    has_left: bool = False
    """Whether this step's gradients are, in part, already on disk."""

    def has_waiting(self, position: int) -> bool:
        """Return whether an earlier backward pass, or use, has left a gradient to which the next one is added."""
        return position in self.sumsq
