"""The disk tier: one preallocated swap file per rank.

Knows the file and which of its extents are allocated; swap_file knows its owner. Must not know what the bytes mean.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from gemini.config import NVMeConfig
from gemini.errors import OutOfTierMemoryError
from gemini.kernels.spans import SpanSource
from gemini.offload.extents import Extent, ExtentAllocator
from gemini.offload.io import (
    IoBackend,
    IoEngine,
    IoOpenFlag,
    IoOperation,
    IoRequest,
    IoStats,
    IoTicket,
    choose_backend,
    empty_aligned,
)
from gemini.offload.swap_file import (
    HEADER_NBYTES,
    GivenFile,
    KeptSwap,
    SwapHeader,
    leave_file,
    remove_file,
    reserve,
    take_file,
    take_kept_file,
)
from gemini.tiers import IO_ALIGNMENT_NBYTES, format_nbytes, round_up

__all__ = ["DiskStore", "ExtentTransfer"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentTransfer:
    """One transfer between a tensor and part of an extent."""

    extent: Extent
    buffer: torch.Tensor
    """CPU tensor, contiguous, any dtype."""
    offset: int = 0
    """First byte, counted from the start of the extent."""


class DiskStore:
    """Hands out extents of a swap file and moves tensors to and from them. Thread-safe: any thread may call any method.

    Transfers bypass the page cache where address, length and offset are multiples of 4096 (see
    gemini.offload.io.empty_aligned) and the file system allows it.

    Args:
        config: directory, budget and I/O backend.
        capacity_nbytes: bytes to reserve for extents, rounded up to a multiple of 4096; the file is one block longer.
        rank: the rank that owns the file; part of its name.
        kept: makes the file outlive the process with its content; None: the file is scratch space, removed by `close`.
        given: an existing file, one block longer than the capacity; None: one is made in the configured directory.

    Raises:
        CheckpointMismatchError: the file to be kept does not hold the expected content.
        ConfigError: the configured engine does not work on this machine.
        OutOfTierMemoryError: the capacity exceeds the configured budget.
        OffloadIOError: the directory is missing or not writable, another run uses it, or the device is full.
    """

    def __init__(
        self,
        config: NVMeConfig,
        *,
        capacity_nbytes: int,
        rank: int = 0,
        kept: KeptSwap | None = None,
        given: GivenFile | None = None,
    ) -> None:
        if capacity_nbytes < 0:
            raise ValueError(f"expected a capacity >= 0 bytes, got {capacity_nbytes}")
        if capacity_nbytes > config.budget_nbytes:
            raise OutOfTierMemoryError(
                f"nvme tier: {format_nbytes(capacity_nbytes)} ({capacity_nbytes} bytes) are needed but "
                f"NVMeConfig.budget allows {format_nbytes(config.budget_nbytes)} ({config.budget_nbytes} bytes); raise "
                "it or keep more in a faster tier"
            )
        backend = choose_backend(config.engine)
        own_path = Path(config.path).absolute() / f"gemini-rank{rank}.{'swap' if kept is None else 'kept'}"
        # - Extents. Guarded by: `_lock`
        self._lock = threading.Lock()
        self._allocator = ExtentAllocator(round_up(capacity_nbytes, IO_ALIGNMENT_NBYTES))
        self._records: dict[Extent, str] = {}  # content of each allocated extent, for messages
        # - The file
        self._path = own_path if given is None else given.path
        self._wants_direct = config.direct
        self._verifies = config.verify
        if given is not None:
            self._fd = os.dup(given.fd)
        else:
            self._fd = take_file(self._path) if kept is None else take_kept_file(self._path)
        leave = remove_file if kept is None and given is None else leave_file
        self._remover = weakref.finalize(self, leave, self._path, self._fd, os.getpid())
        os.register_at_fork(after_in_child=self._remover)  # the lock would last as long as a child that inherits it
        try:
            if kept is not None:
                header = kept.claim(self._path, self._fd, self.capacity_nbytes)
            else:
                header = SwapHeader(
                    pid=os.getpid(),
                    created_s=time.time(),
                    capacity_nbytes=self.capacity_nbytes,
                    host=socket.gethostname(),
                ).pack()
                if given is None:
                    reserve(self._path, self._fd, header, HEADER_NBYTES + self.capacity_nbytes)
            self._engine = IoEngine(backend, queue_depth=config.queue_depth)
            self._open(header)
        except BaseException:
            self.close()
            raise
        _log.info("swap file %s: %s, %s", self._path, format_nbytes(self.capacity_nbytes), backend.value)

    @property
    def path(self) -> Path:
        """Path of the swap file."""
        return self._path

    @property
    def backend(self) -> IoBackend:
        """Kernel interface in use."""
        return self._engine.backend

    @property
    def is_direct(self) -> bool:
        """Whether aligned transfers bypass the page cache."""
        return self._file.is_direct

    @property
    def capacity_nbytes(self) -> int:
        """Number of bytes reserved for extents."""
        return self._allocator.capacity_nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes of all allocated extents."""
        with self._lock:
            return self._allocator.held_nbytes

    def allocate(self, nbytes: int, *, record: str = "") -> Extent:
        """Take an extent of at least `nbytes` > 0; its content is undefined.

        Args:
            nbytes: bytes needed; rounded up to a multiple of 4096.
            record: name of the future content, for messages.

        Returns:
            The extent.

        Raises:
            ValueError: nbytes is not positive.
            OutOfTierMemoryError: no free run of the file is long enough.
        """
        with self._lock:
            extent = self._allocator.allocate(nbytes)
            self._records[extent] = record
            return extent

    def free(self, extent: Extent) -> None:
        """Free an extent; no transfer may be running on it.

        Args:
            extent: an extent from allocate().

        Raises:
            ValueError: the extent is not allocated.
        """
        with self._lock:
            self._allocator.free(extent)
            del self._records[extent]

    def read(self, extent: Extent, tensor: torch.Tensor, *, offset: int = 0) -> IoTicket:
        """Start filling a tensor from an extent; see read_batch."""
        return self.read_batch([ExtentTransfer(extent=extent, buffer=tensor, offset=offset)])[0]

    def write(self, extent: Extent, tensor: torch.Tensor, *, offset: int = 0) -> IoTicket:
        """Start writing a tensor to an extent; see write_batch."""
        return self.write_batch([ExtentTransfer(extent=extent, buffer=tensor, offset=offset)])[0]

    def read_batch(self, transfers: Sequence[ExtentTransfer]) -> list[IoTicket]:
        """Start filling tensors from extents; does not wait for the device.

        Args:
            transfers: the reads; the tensors must not be used until their tickets are complete.

        Returns:
            One ticket for each transfer; order of completion is undefined.

        Raises:
            ValueError: a transfer leaves its extent, an extent is not allocated, or a tensor is not contiguous or not
                on the CPU; nothing was started.
            OffloadIOError: the store is closed.
        """
        return self._submit(IoOperation.READ, transfers)

    def write_batch(self, transfers: Sequence[ExtentTransfer]) -> list[IoTicket]:
        """Start writing tensors to extents; does not wait for the device.

        Args:
            transfers: the writes; the tensors must not change until their tickets are complete.

        Returns:
            One ticket for each transfer; order of completion is undefined.

        Raises:
            ValueError: a transfer leaves its extent, an extent is not allocated, or a tensor is not contiguous or not
                on the CPU; nothing was started.
            OffloadIOError: the store is closed.
        """
        return self._submit(IoOperation.WRITE, transfers)

    @property
    def span_source(self) -> SpanSource:
        """Source of the transfers' spans."""
        return self._engine

    def stats(self) -> IoStats:
        """Return the bytes moved since construction, the header included."""
        return self._engine.stats()

    def close(self) -> None:
        """Complete what the kernel has taken, cancel the rest, release the file, and remove it unless it is kept.

        Closing again does nothing. In a forked child nothing of the parent's is touched.
        """
        if hasattr(self, "_engine"):
            self._engine.close()
        self._remover()

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, header: bytes) -> None:
        flags = IoOpenFlag.READ | IoOpenFlag.WRITE
        if self._wants_direct:
            flags |= IoOpenFlag.DIRECT
        self._file = self._engine.open(self._path, flags, descriptor=self._fd)
        if self._verifies:
            self._file.verify(HEADER_NBYTES + self.capacity_nbytes)
        # Only the first direct transfer shows whether the file system supports what it accepted at open.
        block = empty_aligned(HEADER_NBYTES, torch.uint8)
        block.copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        self._file.write(block, 0).wait()
        if self._wants_direct and not self._file.is_direct:
            _log.warning(
                "the file system of %s does not take O_DIRECT: transfers go through the page cache, whose memory is "
                "in no budget",
                self._path,
            )

    def _submit(self, operation: IoOperation, transfers: Sequence[ExtentTransfer]) -> list[IoTicket]:
        with self._lock:
            for transfer in transfers:
                self._check(operation, transfer)
            records = [self._records[transfer.extent] for transfer in transfers]
        return self._engine.submit(
            [
                IoRequest(
                    file=self._file,
                    operation=operation,
                    buffer=transfer.buffer,
                    offset=HEADER_NBYTES + transfer.extent.offset + transfer.offset,
                    record=record,
                )
                for transfer, record in zip(transfers, records, strict=True)
            ]
        )

    def _check(self, operation: IoOperation, transfer: ExtentTransfer) -> None:
        nbytes = transfer.buffer.numel() * transfer.buffer.element_size()
        if not self._allocator.is_held(transfer.extent):
            raise ValueError(f"cannot {operation.value} {transfer.extent}: it is not allocated in {self._path}")
        if transfer.offset < 0 or transfer.offset + nbytes > transfer.extent.nbytes:
            raise ValueError(
                f"cannot {operation.value} {nbytes} bytes at {transfer.offset} of {transfer.extent}: expected a range "
                f"within its {transfer.extent.nbytes} bytes"
            )
