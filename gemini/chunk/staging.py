"""Host memory through which weights pass from disk to a device."""

from __future__ import annotations

import torch

from gemini.chunk.fetch import Fetch
from gemini.errors import OutOfTierMemoryError
from gemini.offload.slots import SlotSource
from gemini.tiers import format_nbytes

__all__ = ["Staging"]


class Staging:
    """Buffers that fetches take turns in; one is busy until its last copy has left it, after the fetch has ended.

    Args:
        slots: the buffers; closed with this.
    """

    def __init__(self, slots: SlotSource) -> None:
        self._slots = slots
        self._draining: list[Fetch] = []

    def is_free(self) -> bool:
        """Return whether `claim` would not wait."""
        self._reclaim()
        return self._slots.num_free() > 0

    def claim(self, nbytes: int, chunk_name: str) -> torch.Tensor:
        """Return a buffer of at least `nbytes`, uint8; waits until one is free.

        Args:
            nbytes: bytes needed.
            chunk_name: for the error.

        Returns:
            The buffer.

        Raises:
            OutOfTierMemoryError: there is none that large.
        """
        self._reclaim()
        while (buffer := self._slots.acquire(nbytes)) is None:
            if not self._draining:
                raise OutOfTierMemoryError(
                    f"cannot fetch {chunk_name}: {format_nbytes(nbytes)} of host memory are needed between disk and "
                    "device; raise host_budget"
                )
            self._draining[0].wait_for_copies()
            self._reclaim()
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take a claimed buffer back at once; no fetch uses it."""
        self._slots.give_back(buffer)

    def watch(self, fetch: Fetch) -> None:
        """Take the buffer of a fetch back when it has been left."""
        self._draining.append(fetch)

    def close(self) -> None:
        """Give all buffers back; nothing is under way any more."""
        for fetch in self._draining:
            assert fetch.staging is not None
            self._slots.give_back(fetch.staging)
        self._draining = []
        self._slots.close()

    def _reclaim(self) -> None:
        for fetch in [fetch for fetch in self._draining if fetch.may_reuse_staging()]:
            self._draining.remove(fetch)
            assert fetch.staging is not None
            self._slots.give_back(fetch.staging)
