"""What ranks of a machine tell each other about gradients and weights in their common memory.

Each rank has a page in memory that the others see, and stores there alone: how many slots it has published, where they
are, and of how many it has added up its part; in how many gathers its homes may be read, and in how many it has read
the others'. Who waits for a rank waits for the event of that rank's page, which is
the kernel's work; whether the rank still lives is looked at only when nothing has come for a while.
"""

from __future__ import annotations

import os
import select
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from gemini.kernels.events import SharedWords
from zero.request_log import LOOK_S

__all__ = ["NUM_ENTRIES", "Peer", "PeerProcess", "Published", "RankPage"]

NUM_ENTRIES = 64
"""Published slots that a page describes at a time; more than a rank has slots."""
_NUM_PUBLISHED, _NUM_TAKEN, _HAS_LEFT, _NUM_OFFERED, _NUM_READ, _FIRST_ENTRY = 0, 1, 2, 3, 4, 8
_ENTRY_WORDS = 3


class Published(NamedTuple):
    """A slot that a rank has published."""

    offset: int
    """First byte in the rank's memory."""
    nbytes: int
    checksum: int
    """Checksum of everything that the rank has asked for so far; all ranks' must be equal."""


class RankPage:
    """One rank's page.

    Args:
        memory: uint8, a page, zero at first.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._words = SharedWords(memory)
        assert self._words.num_words >= _FIRST_ENTRY + NUM_ENTRIES * _ENTRY_WORDS

    # ---------------------------------------------------------------- by the rank itself

    def publish(self, number: int, published: Published) -> None:
        """Let the others read a slot, which is filled.

        Args:
            number: the sum that the slot is for, from 0; the one before has been published.
            published: the slot.
        """
        first = self._entry(number)
        for index, value in enumerate(published):
            self._words.store(first + index, value)
        self._words.store(_NUM_PUBLISHED, number + 1)
        self._words.signal()

    def take(self, number: int) -> None:
        """Say that this rank has added up its part of a sum and reads the others' slots no more."""
        self._words.store(_NUM_TAKEN, number + 1)
        self._words.signal()

    def offer(self, number: int) -> None:
        """Let the others read this rank's home of what a gather is of; homes of earlier gathers have been offered."""
        self._words.store(_NUM_OFFERED, number + 1)
        self._words.signal()

    def note_read(self, number: int) -> None:
        """Say that this rank has read the others' homes in a gather, and in all before."""
        self._words.store(_NUM_READ, number + 1)
        self._words.signal()

    def leave(self) -> None:
        """Say that nothing more will be published or taken."""
        self._words.store(_HAS_LEFT, 1)
        self._words.signal()

    # ---------------------------------------------------------------- by the others

    def find(self, number: int) -> Published | None:
        """Return a slot; None if it has not been published."""
        if self._words.load(_NUM_PUBLISHED) <= number:
            return None
        first = self._entry(number)
        return Published(*(self._words.load(first + index) for index in range(_ENTRY_WORDS)))

    def has_taken(self, number: int) -> bool:
        """Return whether the rank has added up its part of a sum."""
        return self._words.load(_NUM_TAKEN) > number

    def has_offered(self, number: int) -> bool:
        """Return whether the rank's home may be read in a gather."""
        return self._words.load(_NUM_OFFERED) > number

    def has_read(self, number: int) -> bool:
        """Return whether the rank has read the others' homes in a gather."""
        return self._words.load(_NUM_READ) > number

    @property
    def has_left(self) -> bool:
        """Whether the rank has failed or closed its engine."""
        return bool(self._words.load(_HAS_LEFT))

    def event(self) -> int:
        """Return what to give `wait`; to be called before one looks."""
        return self._words.event()

    def wait(self, seen: int, timeout_s: float) -> bool:
        """Block until the rank says something; see SharedWords.wait."""
        return self._words.wait(seen, timeout_s)

    @staticmethod
    def _entry(number: int) -> int:
        return _FIRST_ENTRY + number % NUM_ENTRIES * _ENTRY_WORDS


class PeerProcess:
    """A process of this machine, watched for its end without asking it.

    Args:
        pid: its number.

    Raises:
        OSError: it is gone, or the system cannot watch processes (Linux before 5.3).
    """

    def __init__(self, pid: int) -> None:
        descriptor = os.pidfd_open(pid)
        self._close = weakref.finalize(self, os.close, descriptor)
        self._end = select.poll()
        self._end.register(descriptor, select.POLLIN)

    def has_ended(self) -> bool:
        """Return whether the process has ended; does not block."""
        return self._close.alive and bool(self._end.poll(0))

    def close(self) -> None:
        """Watch no more. Idempotent."""
        self._close()


class Peer:
    """A rank whose page this one reads, its own included.

    Args:
        rank: its number among all processes.
        process: its process; closed with this.
        memory: uint8, the rank's memory: the page and its slots.
        page_nbytes: bytes of the page.
        timeout_s: how long it may give no sign, in seconds.
    """

    def __init__(
        self, rank: int, process: PeerProcess, memory: torch.Tensor, *, page_nbytes: int, timeout_s: float
    ) -> None:
        self.rank = rank
        self.memory = memory
        self.page = RankPage(memory[:page_nbytes])
        self._timeout_s = timeout_s
        self._process = process

    def wait_for(self, is_there: Callable[[], bool], *, look: Callable[[], None] | None = None) -> None:
        """Block until something is on the rank's page, without the interpreter lock.

        Args:
            is_there: returns whether it is.
            look: called from time to time, may raise.

        Raises:
            RuntimeError: the rank has ended, failed, or given no sign for too long.
        """
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            seen = self.page.event()
            if is_there():
                return
            if self.page.has_left and not is_there():  # what it said before it left counts
                raise RuntimeError(f"rank {self.rank} has left the exchange in host memory")
            if self.page.wait(seen, LOOK_S):
                continue
            if self._process.has_ended() and not is_there():
                raise RuntimeError(f"the process of rank {self.rank} has ended")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"rank {self.rank} has given no sign for {self._timeout_s:g} s")
            if look is not None:
                look()

    def close(self) -> None:
        """Let go of the process; the memory goes with its last view."""
        self._process.close()
