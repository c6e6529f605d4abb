"""Words in memory that processes share, and an event by which one waits for what another stores there.

Knows nothing of what the words mean. Waits are the kernel's and leave the interpreter lock to others.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from torch import Tensor

from gemini._native import ffi, lib
from gemini.errors import WorkerError

__all__ = ["SharedWords"]

WORD_NBYTES = 8


class SharedWords:
    """An event, and 64-bit words that one process stores and others load.

    Who waits for a word loads the event, looks at the word, and waits for the event to change; who has stored a word
    signals.

    Args:
        memory: uint8 [nbytes] shared by the processes, aligned to 8 bytes; zero at first. The event takes the first 8.
    """

    def __init__(self, memory: Tensor) -> None:
        assert memory.data_ptr() % WORD_NBYTES == 0
        self._memory = memory  # keeps the mapping
        self._event: Any = ffi.cast("uint32_t *", memory.data_ptr())
        self._words: Any = ffi.cast("uint64_t *", memory.data_ptr() + WORD_NBYTES)
        self.num_words = memory.numel() // WORD_NBYTES - 1
        """Number of words."""

    def load(self, index: int) -> int:
        """Return a word; what its process stored before it is visible from here on."""
        assert 0 <= index < self.num_words
        return int(lib.gn_memory_load(self._words + index))

    def store(self, index: int, value: int) -> None:
        """Store a word, after everything that was stored before."""
        assert 0 <= index < self.num_words
        lib.gn_memory_publish(self._words + index, value)

    def signal(self) -> None:
        """Wake all who wait for the event, in all processes."""
        _check(lib.gn_event_signal(self._event))

    def event(self) -> int:
        """Return how many signals there have been, modulo 2^32."""
        return int(lib.gn_event_load(self._event))

    def wait(self, seen: int, timeout_s: float) -> bool:
        """Block until there have been other signals than those seen, without the interpreter lock.

        Args:
            seen: what `event` returned before the caller looked at the words.
            timeout_s: maximum wait in seconds.

        Returns:
            Whether to look again; False: nothing has come in time.
        """
        status = lib.gn_event_wait(self._event, seen, int(timeout_s * 1e9))
        if status == -errno.ETIMEDOUT:
            return False
        _check(status)
        return True


def _check(status: int) -> None:
    if status != 0:
        raise WorkerError(f"an event between processes failed: {os.strerror(-status)} (errno {-status})")
