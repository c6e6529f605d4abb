"""Exact-size host memory, page aligned, page-locked for the accelerator where there is one.

torch's pinned allocator rounds every allocation up to a power of two. Here a buffer takes its bytes rounded up to a
page and nothing more. Each buffer is its own mapping, so it can be freed alone.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import torch

from gemini.errors import OutOfTierMemoryError
from gemini.kernels.pool import Ticket, WorkerPool
from gemini.kernels.topology import interleave_memory
from gemini.offload.accelerator import Accelerator
from gemini.offload.memory_file import MemoryFile, SharedBuffer
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, TierLedger, format_nbytes, round_up

__all__ = ["HostArena", "MemorySource"]

logger = logging.getLogger(__name__)

HUGE_PAGE_NBYTES = 2 << 20
MADV_WIPEONFORK = 18
"""Value from Linux's <sys/mman.h>; Python's mmap has no name for it."""

NOT_COPIED_BY_DEVICE = frozenset({"state", "state spares", "gradients"})
"""Purposes of buffers that no device copies from or to: most of the memory, for which page-locking gains nothing."""
MAY_BE_PAGEABLE = frozenset({"working", "spares", "shared weights", "gradients"})
"""Purposes of buffers that can do without page-locking, because their bytes may pass through other buffers."""


class MemorySource(Protocol):
    """A source of a buffer's memory, in place of private memory from the system."""

    @property
    def is_lockable(self) -> bool:
        """Whether page-locking leaves the memory unchanged; locking copy-on-write memory would copy it."""
        ...

    def take(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] on the CPU, page aligned, with its own storage."""


class _Grant(NamedTuple):
    purpose: str
    nbytes: int
    is_locked: bool


class HostArena:
    """Hands out host buffers against the host budget.

    Args:
        ledger: charged for every buffer before it is mapped.
        accelerator: device that copies from or to buffers, which are page-locked so that copies run asynchronously;
            None if there is none.
        nodes: memory nodes over which the pages of each buffer are spread, so that one thread's first touch does not
            put everything behind one memory controller; with fewer than two the system decides.
        never_copied: purposes of buffers that the accelerator does not copy from or to.
        pool: threads that touch the pages of buffers first; None: whoever uses a page first does.
    """

    def __init__(
        self,
        ledger: TierLedger,
        *,
        accelerator: Accelerator | None = None,
        nodes: Sequence[int] = (),
        never_copied: frozenset[str] = NOT_COPIED_BY_DEVICE,
        pool: WorkerPool | None = None,
    ) -> None:
        self._ledger = ledger
        self._accelerator = accelerator
        self._never_copied = never_copied
        self._nodes = tuple(nodes)
        self._pool = pool
        self._buffers: dict[int, _Grant] = {}
        self._has_warned = False

    def allocate(self, nbytes: int, purpose: str, *, source: MemorySource | None = None) -> torch.Tensor:
        """Map a buffer.

        Args:
            nbytes: bytes needed; rounded up to a page.
            purpose: the ledger's name for the purpose of the bytes.
            source: provides the memory; None: private memory of this process.

        Returns:
            uint8 tensor [rounded up bytes] on the CPU, page aligned, with a storage of its own; zero unless the source
            holds content there.

        Raises:
            OutOfTierMemoryError: the host budget or the machine does not have the bytes.
        """
        nbytes = round_up(max(nbytes, 1), IO_ALIGNMENT_NBYTES)
        with self._charging(nbytes, purpose):
            if source is None:
                buffer = _map_memory(nbytes)
                self._interleave(buffer)
                self._populate_to_lock(buffer, purpose)
            else:
                buffer = source.take(nbytes)
        self._grant(buffer, nbytes, purpose, is_lockable=source is None or source.is_lockable)
        return buffer

    def populate(self, buffer: torch.Tensor) -> Ticket | None:
        """Start the first touch of a buffer's pages, by all threads of the pool; the system then counts them as used.

        Args:
            buffer: a buffer of private memory from `allocate`; may be written to meanwhile.

        Returns:
            The job's ticket; None if there is no pool.
        """
        return None if self._pool is None else self._pool.submit_populate(buffer)

    def take_shared(self, file: MemoryFile, nbytes: int, purpose: str) -> SharedBuffer:
        """Take the next part of a memory file and charge this process's share of it.

        Args:
            file: the mapped file.
            nbytes: bytes needed, in whole pages.
            purpose: the ledger's name for the purpose of the bytes.

        Returns:
            The part; free its `view` like a buffer from `allocate`.

        Raises:
            OutOfTierMemoryError: the host budget or the machine does not have the bytes.
        """
        with self._charging(file.share_of(nbytes), purpose):
            buffer = file.take(nbytes)
            if buffer.writer is not None:
                self._interleave(buffer.writer)
            file.reserve(buffer)
        self._grant(buffer.view, file.share_of(nbytes), purpose)
        return buffer

    def adopt(self, buffer: torch.Tensor, purpose: str) -> None:
        """Page-lock memory that another process has been charged for, as if it came from here; `free` undoes it."""
        self._grant(buffer, 0, purpose)

    @contextmanager
    def _charging(self, nbytes: int, purpose: str) -> Iterator[None]:
        """Charge the ledger for what is mapped inside the context, unless the machine refuses it."""
        self._ledger.charge(MemoryTier.HOST, purpose, nbytes)
        try:
            yield
        except OSError as error:
            self._ledger.credit(MemoryTier.HOST, purpose, nbytes)
            raise OutOfTierMemoryError(
                f"the machine refused {format_nbytes(nbytes)} of host memory for {purpose}: {error}; lower host_budget"
            ) from error

    def _populate_to_lock(self, buffer: torch.Tensor, purpose: str) -> None:
        """Touch what is to be page-locked: the driver's one thread would take far longer to do it."""
        ticket = None
        if self._accelerator is not None and purpose not in self._never_copied:
            ticket = self.populate(buffer)
        if ticket is not None:
            ticket.wait()

    def _interleave(self, buffer: torch.Tensor) -> None:
        if len(self._nodes) > 1:
            interleave_memory(buffer.data_ptr(), buffer.numel(), self._nodes)

    def _grant(self, buffer: torch.Tensor, nbytes: int, purpose: str, *, is_lockable: bool = True) -> None:
        is_locked = purpose not in self._never_copied and is_lockable and self._lock(buffer, purpose)
        self._buffers[buffer.data_ptr()] = _Grant(purpose, nbytes, is_locked)

    def is_pageable(self, buffer: torch.Tensor) -> bool:
        """Return whether the accelerator's copies from and to a buffer block, because it is not page-locked."""
        return self._accelerator is not None and not self._buffers[buffer.data_ptr()].is_locked

    def free(self, buffer: torch.Tensor) -> None:
        """Free a buffer; its memory is released with the last view of it."""
        self._give_back(buffer.data_ptr(), self._buffers.pop(buffer.data_ptr()))

    def close(self) -> None:
        """Free every buffer."""
        for address, grant in self._buffers.items():
            self._give_back(address, grant)
        self._buffers.clear()

    def _give_back(self, address: int, grant: _Grant) -> None:
        self._ledger.credit(MemoryTier.HOST, grant.purpose, grant.nbytes)
        if grant.is_locked and self._accelerator is not None:
            self._accelerator.unlock(address)

    def _lock(self, buffer: torch.Tensor, purpose: str) -> bool:
        """Page-lock a buffer for the accelerator; return whether that was done.

        Some systems lock little (WSL2: about 1 GiB). What others pass through is then locked in place of homes.
        """
        if self._accelerator is None:
            return False
        refusal = self._accelerator.lock(buffer)
        if refusal is not None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "page-locking host memory failed (%s): memory that is not locked is copied through slots", refusal
            )
        for address, grant in reversed(list(self._buffers.items())) if purpose not in MAY_BE_PAGEABLE else ():
            if refusal is None:
                break
            if grant.is_locked and grant.purpose in MAY_BE_PAGEABLE:
                self._accelerator.unlock(address)
                self._buffers[address] = grant._replace(is_locked=False)
                refusal = self._accelerator.lock(buffer)
        return refusal is None


def _map_memory(nbytes: int) -> torch.Tensor:
    """Map private anonymous memory, in huge pages as far as they fit; returns uint8 [nbytes], zero.

    Huge pages gain a third of the disk's bandwidth and save most of the processor time of a transfer
    (docs/decisions/0010-huge-pages-for-host-memory.md). Kernels give them to private memory only, so a fork is told to
    zeros to the child here: otherwise this process would copy every page it writes to while the child lives.
    """
    is_large = nbytes >= HUGE_PAGE_NBYTES
    mapping = mmap.mmap(-1, nbytes + is_large * HUGE_PAGE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    skip = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE_NBYTES if is_large else 0
    with suppress(OSError):  # a kernel before 4.14, where a fork copies pages that are written to
        mapping.madvise(MADV_WIPEONFORK, skip, nbytes)
    if is_large:
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE, skip, nbytes - nbytes % HUGE_PAGE_NBYTES)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=skip, count=nbytes)
