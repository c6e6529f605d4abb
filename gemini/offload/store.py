"""The disk tier: one preallocated swap file for each rank.

Knows the file, its owner and which extents of it are taken. Must not know what the bytes mean.

[Note: swap file]
`gemini-rank{rank}.swap` belongs to whoever holds an exclusive flock(2) on it, so that a killed process gives it up
without doing anything; its file is then taken over. The first 4096 bytes are a header, little endian and padded with
zeros; extents count from its end:

    offset  type      field
    0       8 bytes   magic, b"GEMSWAP" and a zero byte
    8       uint32    format version, 2
    12      uint32    process id of the owner
    16      float64   time of creation, seconds since the epoch
    24      uint64    capacity in bytes, header not counted
    32      64 bytes  host name of the owner, UTF-8, cut, padded with zeros

Nothing in the file outlives the process: it is scratch space, and its owner removes it. A file that bears the magic
and that nobody holds is therefore free for the taking, whatever its version; one that does not bear it is left alone.
The header is on the device before anything else is done with the file, so that this is known even after a crash of
the whole machine.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from gemini.config import NVMeConfig
from gemini.errors import OffloadIOError, OutOfTierMemoryError
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
from gemini.tiers import IO_ALIGNMENT_NBYTES, format_nbytes, round_up

__all__ = ["DiskStore", "ExtentTransfer", "SwapHeader", "check_directory", "remove_abandoned"]

_log = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sIIdQ64s")
_MAGIC = b"GEMSWAP\0"
_FORMAT_VERSION = 2
_HOST_NBYTES = 64
_HEADER_NBYTES = IO_ALIGNMENT_NBYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapHeader:
    """First block of a swap file; see [Note: swap file]."""

    pid: int
    created_s: float
    """Seconds since the epoch."""
    capacity_nbytes: int
    host: str
    """Name of the machine the owner runs on: those that share a file system have processes of the same number."""

    @property
    def owner(self) -> str:
        """Who made the file, in words."""
        return f"process {self.pid} on {self.host}" if self.host.isprintable() and self.host else f"process {self.pid}"

    def pack(self) -> bytes:
        """Return the block, 4096 bytes."""
        host = self.host.encode("utf-8", "replace")[:_HOST_NBYTES]
        fields = _HEADER.pack(_MAGIC, _FORMAT_VERSION, self.pid, self.created_s, self.capacity_nbytes, host)
        return fields.ljust(_HEADER_NBYTES, b"\0")

    @staticmethod
    def unpack(block: bytes) -> SwapHeader | None:
        """Read a block, which may hold anything; None if it is not a header of this version."""
        if len(block) < _HEADER.size or not bears_magic(block):
            return None
        _, version, pid, created_s, capacity_nbytes, host = _HEADER.unpack_from(block)
        if version != _FORMAT_VERSION:
            return None
        return SwapHeader(
            pid=pid,
            created_s=created_s,
            capacity_nbytes=capacity_nbytes,
            host=host.rstrip(b"\0").decode("utf-8", "replace"),
        )


def bears_magic(block: bytes) -> bool:
    """Return whether a file that begins with these bytes is a swap file, of any version."""
    return block.startswith(_MAGIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentTransfer:
    """One transfer between a tensor and part of an extent."""

    extent: Extent
    buffer: torch.Tensor
    """CPU tensor, contiguous, any dtype."""
    offset: int = 0
    """First byte, counted from the start of the extent."""


class DiskStore:
    """Hand out extents of a swap file and move tensors to and from them. All methods may be called from any thread.

    Transfers bypass the page cache where address, length and offset are multiples of 4096 (see
    gemini.offload.io.empty_aligned) and the file system allows it.

    Args:
        config: directory, budget and how to ask the kernel.
        capacity_nbytes: bytes to reserve for extents, rounded up to a multiple of 4096; the file is one block longer.
        rank: whose file it is; part of its name.

    Raises:
        ConfigError: the configured engine does not work on this machine.
        OutOfTierMemoryError: the capacity exceeds the configured budget.
        OffloadIOError: the directory is missing or not writable, another run uses it, or the device is full.
    """

    def __init__(self, config: NVMeConfig, *, capacity_nbytes: int, rank: int = 0) -> None:
        if capacity_nbytes < 0:
            raise ValueError(f"expected a capacity >= 0 bytes, got {capacity_nbytes}")
        if capacity_nbytes > config.budget_nbytes:
            raise OutOfTierMemoryError(
                f"nvme tier: {format_nbytes(capacity_nbytes)} ({capacity_nbytes} bytes) are needed but "
                f"NVMeConfig.budget allows {format_nbytes(config.budget_nbytes)} ({config.budget_nbytes} bytes); raise "
                "it or keep more in a faster tier"
            )
        backend = choose_backend(config.engine)
        self._path = Path(config.path).absolute() / f"gemini-rank{rank}.swap"
        self._lock = threading.Lock()  # guards the allocator
        self._allocator = ExtentAllocator(round_up(capacity_nbytes, IO_ALIGNMENT_NBYTES))
        self._records: dict[Extent, str] = {}  # what the extents handed out hold, for messages
        self._wants_direct = config.direct
        self._verifies = config.verify
        self._lock_fd = _take_file(self._path)
        self._remover = weakref.finalize(self, _remove_file, self._path, self._lock_fd, os.getpid())
        os.register_at_fork(after_in_child=self._remover)  # the lock would last as long as a child that inherits it
        try:
            header = SwapHeader(
                pid=os.getpid(),
                created_s=time.time(),
                capacity_nbytes=self.capacity_nbytes,
                host=socket.gethostname(),
            ).pack()
            _reserve(self._path, self._lock_fd, header, _HEADER_NBYTES + self.capacity_nbytes)
            self._engine = IoEngine(backend, queue_depth=config.queue_depth)
            self._open(header)
        except BaseException:
            self.close()
            raise
        _log.info("swap file %s: %s, %s", self._path, format_nbytes(self.capacity_nbytes), backend.value)

    @property
    def path(self) -> Path:
        """The swap file."""
        return self._path

    @property
    def backend(self) -> IoBackend:
        """How the kernel is asked for bytes."""
        return self._engine.backend

    @property
    def is_direct(self) -> bool:
        """Whether aligned transfers bypass the page cache."""
        return self._file.is_direct

    @property
    def capacity_nbytes(self) -> int:
        """Bytes reserved for extents."""
        return self._allocator.capacity_nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes of all extents handed out."""
        with self._lock:
            return self._allocator.held_nbytes

    def allocate(self, nbytes: int, *, record: str = "") -> Extent:
        """Take an extent of at least `nbytes` > 0; its contents are undefined.

        Args:
            nbytes: bytes needed; rounded up to a multiple of 4096.
            record: what it will hold, for messages.

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
        """Give an extent back; no transfer may be under way on it.

        Args:
            extent: as allocate() returned it.

        Raises:
            ValueError: it is not allocated.
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
            transfers: what to read; the tensors must not be used until their tickets are complete.

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
            transfers: what to write; the tensors must not change until their tickets are complete.

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
        """Who knows when the transfers ran."""
        return self._engine

    def stats(self) -> IoStats:
        """Return the bytes moved since construction, the header included."""
        return self._engine.stats()

    def close(self) -> None:
        """Complete what the kernel already has, cancel the rest, remove the file and give up the directory.

        Closing again does nothing. In the child of a fork nothing of the parent's is touched.
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
        self._file = self._engine.open(self._path, flags)
        if self._verifies:
            self._file.verify(_HEADER_NBYTES + self.capacity_nbytes)
        # The first direct transfer shows whether the file system means what it said at open.
        block = empty_aligned(_HEADER_NBYTES, torch.uint8)
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
                    offset=_HEADER_NBYTES + transfer.extent.offset + transfer.offset,
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


def remove_abandoned(directory: Path) -> list[Path]:
    """Remove the swap files of processes that are gone.

    Args:
        directory: where to look.

    Returns:
        What was removed. Files that cannot be are left, as those of living processes are.
    """
    removed = []
    for path in sorted(directory.glob("gemini-rank*.swap")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            _lock(path, fd)
            if _is_same_file(path, fd):
                _empty_stale_file(path, fd)
                os.unlink(path)
                removed.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)
    return removed


def _take_file(path: Path) -> int:
    """Open and lock the swap file, taking over one whose owner is gone; returns the descriptor of the lock."""
    check_directory(path.parent)
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _directory_error(path, error.errno or errno.EIO) from error
        try:
            _lock(path, fd)
            if _is_same_file(path, fd):
                _empty_stale_file(path, fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its owner removed it between our open and our lock


def check_directory(directory: Path) -> None:
    """Raise OffloadIOError if there is no such directory."""
    try:
        is_directory = directory.is_dir()
        directory.stat()
    except OSError as error:
        raise _directory_error(directory, error.errno or errno.EIO) from error
    if not is_directory:
        raise _directory_error(directory, errno.ENOTDIR)


def _directory_error(path: Path, errno_value: int) -> OffloadIOError:
    hints = {
        errno.ENOENT: "create the directory first, or name another one in NVMeConfig.path",
        errno.ENOTDIR: "NVMeConfig.path has to name a directory",
        errno.EROFS: "the file system is mounted read-only; name a writable directory in NVMeConfig.path",
        errno.EACCES: "the directory is not writable for this user; name another one in NVMeConfig.path",
        errno.EPERM: "the directory is not writable for this user; name another one in NVMeConfig.path",
        errno.ENOSPC: "free space on that file system, or name another directory in NVMeConfig.path",
        errno.ELOOP: "the name is a symbolic link, which is not followed; remove it",
    }
    hint = hints.get(errno_value, "name another directory in NVMeConfig.path")
    return OffloadIOError("use as swap space", str(path), errno_value, hint=hint)


def _lock(path: Path, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        header = SwapHeader.unpack(os.pread(fd, _HEADER_NBYTES, 0))
        owner = "another process" if header is None else header.owner
        hint = f"{owner} uses it now: give this run another directory or wait for that one"
        raise OffloadIOError("lock", str(path), errno.EBUSY, hint=hint) from error
    except OSError as error:
        raise _directory_error(path, error.errno or errno.EIO) from error


def _is_same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _empty_stale_file(path: Path, fd: int) -> None:
    nbytes = os.fstat(fd).st_size
    if nbytes == 0:
        return
    block = os.pread(fd, _HEADER_NBYTES, 0)
    if not bears_magic(block):
        hint = "a file of that name exists but is not a swap file: move it away"
        raise OffloadIOError("use as swap space", str(path), errno.EEXIST, hint=hint)
    header = SwapHeader.unpack(block)
    owner = "a process of another version" if header is None else header.owner
    _log.info("taking over swap file %s (%s): its owner, %s, is gone", path, format_nbytes(nbytes), owner)
    os.ftruncate(fd, 0)


def _reserve(path: Path, fd: int, header: bytes, nbytes: int) -> None:
    try:
        os.pwrite(fd, header, 0)  # first of all, so that whoever finds the lock taken can name us
        os.fsync(fd)
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        os.ftruncate(fd, 0)
        state = os.fstatvfs(fd)
        num_free = state.f_bavail * state.f_frsize
        hint = (
            f"the swap file needs {format_nbytes(nbytes)} ({nbytes} bytes), the file system has "
            f"{format_nbytes(num_free)} ({num_free} bytes) free: free some, or keep more in a faster tier"
        )
        if error.errno == errno.EFBIG:
            hint = f"the swap file needs {nbytes} bytes, which is above a file size limit (ulimit -f): raise it"
        raise OffloadIOError("reserve space for", str(path), error.errno or errno.EIO, hint=hint) from error


def _remove_file(path: Path, fd: int, pid: int) -> None:
    """Remove a swap file and give up its lock; the child of a fork only drops its descriptor."""
    try:
        if os.getpid() == pid and _is_same_file(path, fd):
            os.unlink(path)
    except OSError as error:
        _log.warning("cannot remove swap file %s: %s", path, error)
    finally:
        os.close(fd)
