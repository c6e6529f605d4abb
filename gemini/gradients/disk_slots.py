"""Buffers that gradients pass through on their way from compute memory to their homes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemini.gradients.chunk_gradients import GradChunk
from gemini.offload.io import IoTicket
from gemini.offload.transfer import Move

__all__ = ["Departure", "GradientSlot"]


@dataclass(eq=False)
class GradientSlot:
    """A buffer that chunks' gradients share, one chunk at a time."""

    buffer: torch.Tensor
    busy: IoTicket | None = None
    reader: int | None = None
    """The chunk whose gradients somebody may be reading here."""


@dataclass
class Departure:
    """A chunk's gradients travelling from a device slot to a host slot."""

    chunk: GradChunk
    positions: list[int]
    device_slot: GradientSlot
    host_slot: GradientSlot
    move: Move
