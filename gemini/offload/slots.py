"""Reusable buffers for chunks, in compute memory and in host memory for chunks on their way there.

An engine has as many slots, of one size, as its plan says. A ChunkManager that is used alone makes and drops slots as
its chunks come and go.
"""

from __future__ import annotations

from typing import Protocol

import torch

from gemini.errors import OutOfTierMemoryError
from gemini.offload.transfer import Transfers

__all__ = ["FixedSlots", "GrowingSlots", "SlotSource"]


class SlotSource(Protocol):
    """A source of buffers for chunks."""

    reuses_buffers: bool
    """Whether a returned buffer may be handed out again while something still refers to it."""

    def acquire(self, nbytes: int) -> torch.Tensor | None:
        """Return uint8 memory of at least `nbytes`; None if nothing is free."""

    def give_back(self, buffer: torch.Tensor) -> None:
        """Give back a buffer from `acquire`."""

    def num_free(self) -> int:
        """Return how many buffers are available without waiting for others, as far as is known."""

    def close(self) -> None:
        """Free every buffer; none may be in use."""


class FixedSlots:
    """A fixed number of equal buffers, allocated at once.

    Args:
        transfers: source of the memory.
        num_slots: number of buffers.
        slot_nbytes: bytes of each buffer.
        purpose: the ledger's name for the purpose of these bytes.
    """

    reuses_buffers = True

    def __init__(self, transfers: Transfers, *, num_slots: int, slot_nbytes: int, purpose: str) -> None:
        self._transfers = transfers
        self._purpose = purpose
        self._slot_nbytes = slot_nbytes
        self._all = [transfers.allocate(slot_nbytes, purpose) for _ in range(num_slots)]
        self._free = list(reversed(self._all))

    def acquire(self, nbytes: int) -> torch.Tensor | None:
        """Return a free buffer; None if all are taken."""
        assert nbytes <= self._slot_nbytes, f"a chunk of {nbytes} bytes does not fit a slot of {self._slot_nbytes}"
        return self._free.pop() if self._free else None

    def give_back(self, buffer: torch.Tensor) -> None:
        """Give back a buffer."""
        self._free.append(buffer)

    def num_free(self) -> int:
        """Return how many buffers are free."""
        return len(self._free)

    def close(self) -> None:
        """Free every buffer."""
        for buffer in self._all:
            self._transfers.free(buffer, self._purpose)
        self._all, self._free = [], []


class GrowingSlots:
    """Buffers of the requested size, as long as the tier's budget lasts.

    Args:
        transfers: source of the memory.
        purpose: the ledger's name for the purpose of these bytes.
    """

    reuses_buffers = False

    def __init__(self, transfers: Transfers, *, purpose: str) -> None:
        self._transfers = transfers
        self._purpose = purpose

    def acquire(self, nbytes: int) -> torch.Tensor | None:
        """Return a new buffer; None if the budget does not allow it."""
        try:
            return self._transfers.allocate(nbytes, self._purpose)
        except OutOfTierMemoryError:
            return None

    def give_back(self, buffer: torch.Tensor) -> None:
        """Free a buffer."""
        self._transfers.free(buffer, self._purpose)

    def num_free(self) -> int:
        """Return 0: only a request shows whether there is room."""
        return 0

    def close(self) -> None:
        """Do nothing: each buffer is freed when it is given back."""
