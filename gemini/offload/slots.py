"""Reusable buffers for chunks, in compute memory and, on their way there, in host memory.

An engine has as many slots, of one size, as its plan says. A ChunkManager used by itself makes and drops them as its
chunks come and go.
"""

from __future__ import annotations

from typing import Protocol

import torch

from gemini.errors import OutOfTierMemoryError
from gemini.offload.transfer import Transfers

__all__ = ["FixedSlots", "GrowingSlots", "SlotSource"]


class SlotSource(Protocol):
    """Where buffers for chunks come from."""

    reuses_buffers: bool
    """Whether a buffer that was given back may be handed out again while someone still looks at it."""

    def acquire(self, nbytes: int) -> torch.Tensor | None:
        """Return uint8 memory of at least `nbytes`, None if nothing is free."""

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return a buffer from `acquire`."""

    def num_free(self) -> int:
        """Return how many buffers can be had without anything being given back, as far as is known."""

    def close(self) -> None:
        """Free every buffer; none may be in use."""


class FixedSlots:
    """A fixed number of equal buffers, allocated at once.

    Args:
        transfers: source of the memory.
        num_slots: how many.
        slot_nbytes: bytes of each.
        purpose: the ledger's word for them.
    """

    reuses_buffers = True

    def __init__(self, transfers: Transfers, *, num_slots: int, slot_nbytes: int, purpose: str) -> None:
        self._transfers = transfers
        self._purpose = purpose
        self._slot_nbytes = slot_nbytes
        self._all = [transfers.allocate(slot_nbytes, purpose) for _ in range(num_slots)]
        self._free = list(reversed(self._all))

    def acquire(self, nbytes: int) -> torch.Tensor | None:
        """Return a free buffer, None if all are taken."""
        assert nbytes <= self._slot_nbytes, f"a chunk of {nbytes} bytes does not fit a slot of {self._slot_nbytes}"
        return self._free.pop() if self._free else None

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return a buffer."""
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
    """Buffers of the size asked for, as long as the tier's budget lasts.

    Args:
        transfers: source of the memory.
        purpose: the ledger's word for them.
    """

    reuses_buffers = False

    def __init__(self, transfers: Transfers, *, purpose: str) -> None:
        self._transfers = transfers
        self._purpose = purpose

    def acquire(self, nbytes: int) -> torch.Tensor | None:
        """Return a new buffer, None if the budget does not allow it."""
        try:
            return self._transfers.allocate(nbytes, self._purpose)
        except OutOfTierMemoryError:
            return None

    def give_back(self, buffer: torch.Tensor) -> None:
        """Free a buffer."""
        self._transfers.free(buffer, self._purpose)

    def num_free(self) -> int:
        """Return 0: whether there is room shows only when it is asked for."""
        return 0

    def close(self) -> None:
        """Do nothing: a buffer given back is freed at once."""
