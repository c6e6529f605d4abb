"""Buffers that gradients pass through on their way from compute memory to their homes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemini.offload.io import IoTicket

__all__ = ["GradientSlot"]


@dataclass(eq=False)
class GradientSlot:
    """A buffer that chunks' gradients share, one chunk at a time."""

    buffer: torch.Tensor
    busy: IoTicket | None = None
    reader: int | None = None
    """Chunk whose gradients may be read here now; None if there is none."""
