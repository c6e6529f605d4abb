"""Park tensors in a file, with the interface of TensorNVMe's DiskOffloader.

[Note: differences from TensorNVMe]
* A read keeps the record: a tensor can be read again, and writing it again replaces the record.
* Every failure raises OffloadIOError, and a tensor whose write failed keeps its memory and its bytes. In TensorNVMe, a
  full disk or a short transfer silently lost data.
* Any dtype and any length; in TensorNVMe, a single transfer ended at 2 GiB.
* Tensors that cannot be parked (not contiguous, not on the CPU, part of a larger storage, memory that torch does not
  own) are refused at once, before anything happens. A tensor that covers its storage is accepted even if other tensors
  alias it: they lose and regain their bytes together.
* A record belongs to the tensor object and is deleted with it, which frees its place in the file.
* The synchronous calls use the chosen backend too.
* A list is not a unit on disk: what was written as a list may be read tensor by tensor and the other way round, in
  any order. A list is written completely or not at all: if one write fails, every tensor keeps its bytes.
* Two operations on the same tensor run in the order of the calls.
* `close()` removes the file, and so does the end of the process. CUDA is not needed. Missing parent directories are
made.
* No environment variables; `sync_read_events` waits for reads.
As in TensorNVMe, memory is freed, and callbacks run, when a later call finds that a write is complete.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from gemini.errors import ConfigError, OffloadIOError, TensorError
from gemini.offload.extents import Extent, ExtentAllocator
from gemini.offload.io import (
    IoBackend,
    IoEngine,
    IoFile,
    IoOpenFlag,
    IoOperation,
    IoRequest,
    IoTicket,
    choose_backend,
)
from gemini.tiers import IO_ALIGNMENT_NBYTES, round_up

__all__ = ["DiskOffloader"]

_log = logging.getLogger(__name__)

_BACKEND_NAMES = {
    "uring": "io_uring",
    "io_uring": "io_uring",
    "aio": "aio",
    "pthread": "threads",
    "threads": "threads",
    "auto": "auto",
}
_GROWTH_NBYTES = 64 << 20


@dataclass(slots=True, kw_only=True)
class _Record:
    """Place of a tensor's bytes."""

    tensor_ref: weakref.ref[torch.Tensor]
    extent: Extent | None  # None: no bytes
    nbytes: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Operation:
    """A running call: one or several tensors in one direction."""

    kind: IoOperation
    tensors: list[torch.Tensor]
    tickets: list[IoTicket]
    callback: Callable[[], None] | None
    extents: list[Extent | None] = field(default_factory=list)  # for a write: where the bytes go
    restored: list[torch.Tensor] = field(default_factory=list)  # for a read: tensors that had no memory before


class DiskOffloader:
    """Moves tensors' bytes to a file and back; a written tensor keeps its shape but not its memory.

    See [Note: differences from TensorNVMe]. Thread-safe: calls from several threads run one after another.

    Args:
        dir_name: directory for the file; made if it is missing.
        n_entries: maximum number of kernel requests in flight.
        backend: "uring" ("io_uring"), "aio", "pthread" ("threads") or "auto".

    Raises:
        ConfigError: the backend is unknown or does not work on this machine.
        OffloadIOError: the directory or the file cannot be made.
    """

    def __init__(self, dir_name: str | os.PathLike[str], n_entries: int = 16, backend: str = "uring") -> None:
        if backend not in _BACKEND_NAMES:
            raise ConfigError(f"DiskOffloader backend: expected one of {', '.join(_BACKEND_NAMES)}, got {backend!r}")
        chosen = choose_backend(_BACKEND_NAMES[backend])
        path = Path(dir_name).absolute() / f"offload-{uuid.uuid4().hex}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OffloadIOError("make directory", str(path.parent), error.errno or errno.EIO) from error
        # - Where bytes go
        self._lock = threading.RLock()
        self._engine = IoEngine(chosen, queue_depth=n_entries)
        try:
            flags = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.CREATE
            self._file: IoFile = self._engine.open(path, flags)
        except BaseException:
            self._engine.close()
            raise
        self._remover = weakref.finalize(self, _remove_file, path, os.getpid())
        self._allocator = ExtentAllocator(0)
        self._orphans: collections.deque[int] = collections.deque()  # ids of collected tensors, added without the lock
        # - Tensors and running calls. Guarded by: `_lock`
        self._records: dict[int, _Record] = {}  # by id of the tensor
        self._operations: list[_Operation] = []  # oldest first
        self._errors: dict[IoOperation, list[BaseException]] = {kind: [] for kind in IoOperation}
        self._is_closed = False

    @property
    def backend(self) -> IoBackend:
        """Kernel interface that moves the bytes."""
        return self._engine.backend

    @property
    def held_nbytes(self) -> int:
        """Bytes that records take in the file, each rounded up to a multiple of 4096."""
        with self._lock:
            return self._allocator.held_nbytes

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the file since construction."""
        return self._engine.stats().nbytes_written

    def sync_write(self, tensor: torch.Tensor) -> None:
        """Write a tensor and free its memory; see sync_writev."""
        self.sync_writev([tensor])

    def sync_read(self, tensor: torch.Tensor) -> None:
        """Read a tensor back; see sync_readv."""
        self.sync_readv([tensor])

    def async_write(self, tensor: torch.Tensor, callback: Callable[[], None] | None = None) -> None:
        """Start writing a tensor; see async_writev."""
        self.async_writev([tensor], callback)

    def async_read(self, tensor: torch.Tensor, callback: Callable[[], None] | None = None) -> None:
        """Start reading a tensor back; see async_readv."""
        self.async_readv([tensor], callback)

    def sync_writev(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write tensors and free their memory.

        Args:
            tensors: CPU tensors, contiguous, each covering its whole storage, no tensor twice.

        Raises:
            TensorError: a tensor cannot be parked; nothing was done.
            OffloadIOError: a write failed; all the tensors keep their memory, bytes and earlier records.
        """
        with self._lock:
            self._finish(self._start_write(tensors, None))

    def sync_readv(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give tensors their memory and bytes back.

        Args:
            tensors: tensors written by any earlier call; their present bytes are overwritten.

        Raises:
            TensorError: a tensor was never written, or its length changed; nothing was done.
            OffloadIOError: a read failed; tensors that had no memory before have none again, so that the read can be
                tried again.
        """
        with self._lock:
            self._finish(self._start_read(tensors, None))

    def async_writev(self, tensors: Sequence[torch.Tensor], callback: Callable[[], None] | None = None) -> None:
        """Start writing tensors; they must not change until the write has been awaited.

        Args:
            tensors: as for sync_writev.
            callback: called without arguments when all are written and freed, in the thread that notices; not called
                if a write failed.

        Raises:
            TensorError: a tensor cannot be parked; nothing was done.
            OffloadIOError: the offloader is closed. Failures of the write itself are raised by sync_write_events.
        """
        with self._lock:
            self._poll()
            self._start_write(tensors, callback)

    def async_readv(self, tensors: Sequence[torch.Tensor], callback: Callable[[], None] | None = None) -> None:
        """Start giving tensors their bytes back; they must not be used until the read has been awaited.

        Args:
            tensors: as for sync_readv.
            callback: called without arguments when all are read, in the thread that notices; not called if a read
                failed.

        Raises:
            TensorError: a tensor was never written, or its length changed; nothing was done.
            OffloadIOError: the offloader is closed. Failures of the read itself are raised by sync_read_events.
        """
        with self._lock:
            self._poll()
            self._start_read(tensors, callback)

    def sync_write_events(self) -> None:
        """Wait for all writes.

        Raises:
            OffloadIOError: one of them failed since the last call; further failures are logged.
        """
        self._wait_for([IoOperation.WRITE])

    def sync_read_events(self) -> None:
        """Wait for all reads.

        Raises:
            OffloadIOError: one of them failed since the last call; further failures are logged.
        """
        self._wait_for([IoOperation.READ])

    def synchronize(self) -> None:
        """Wait for all reads and writes.

        Raises:
            OffloadIOError: one of them failed since the last call; further failures are logged.
        """
        self._wait_for([IoOperation.READ, IoOperation.WRITE])

    def close(self) -> None:
        """Wait for running operations and remove the file; tensors that are only on disk are lost.

        Closing again does nothing. Failures that no call reported are logged.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            try:
                while self._operations:
                    self._finish_noting(self._operations[0])
                for kind in IoOperation:
                    for error in self._errors[kind]:
                        _log.error("DiskOffloader closed with an unreported failed %s: %s", kind.value, error)
            finally:
                self._engine.close()
                self._remover()
                self._records.clear()

    def __enter__(self) -> DiskOffloader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_write(self, tensors: Sequence[torch.Tensor], callback: Callable[[], None] | None) -> _Operation:
        self._prepare(tensors)
        for tensor in tensors:
            if tensor.untyped_storage().nbytes() != _nbytes_of(tensor):
                raise TensorError(f"cannot write {_describe(tensor)}: its memory is freed; read it back first")
        extents: list[Extent | None] = []
        try:
            for tensor in tensors:
                extents.append(self._allocate(_nbytes_of(tensor)))
            tickets = self._submit(IoOperation.WRITE, tensors, extents)
        except BaseException:
            self._free(extents)
            raise
        operation = _Operation(
            kind=IoOperation.WRITE, tensors=list(tensors), tickets=tickets, callback=callback, extents=extents
        )
        self._operations.append(operation)
        return operation

    def _start_read(self, tensors: Sequence[torch.Tensor], callback: Callable[[], None] | None) -> _Operation:
        self._prepare(tensors)
        extents = [self._find_record(tensor).extent for tensor in tensors]
        restored: list[torch.Tensor] = []
        try:
            for tensor in tensors:
                if tensor.untyped_storage().nbytes() != _nbytes_of(tensor):
                    tensor.untyped_storage().resize_(_nbytes_of(tensor))
                    restored.append(tensor)
            tickets = self._submit(IoOperation.READ, tensors, extents)
        except BaseException:
            _release(restored)
            raise
        operation = _Operation(
            kind=IoOperation.READ, tensors=list(tensors), tickets=tickets, callback=callback, restored=restored
        )
        self._operations.append(operation)
        return operation

    def _prepare(self, tensors: Sequence[torch.Tensor]) -> None:
        """Refuse tensors that cannot be parked, then finish running operations on the same tensors."""
        if self._is_closed:
            raise OffloadIOError("use closed DiskOffloader on", self._file.path, errno.EBADF)
        for tensor in tensors:
            _check(tensor)
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        if len(storages) != len(tensors):
            raise TensorError(f"expected {len(tensors)} different storages in one call, got {len(storages)}")
        for operation in [*self._operations]:
            if any(tensor.untyped_storage()._cdata in storages for tensor in operation.tensors):
                self._finish_noting(operation)
        while self._orphans:
            self._drop_record(self._orphans.popleft())

    def _find_record(self, tensor: torch.Tensor) -> _Record:
        record = self._records.get(id(tensor))
        if record is None or record.tensor_ref() is not tensor:
            raise TensorError(f"cannot read {_describe(tensor)}: it was never written through this offloader")
        if record.nbytes != _nbytes_of(tensor):
            raise TensorError(f"cannot read {_describe(tensor)}: {record.nbytes} bytes of it were written")
        return record

    def _drop_record(self, key: int) -> None:
        record = self._records.get(key)
        if record is not None and record.tensor_ref() is None:  # else the id belongs to a new tensor by now
            del self._records[key]
            self._free([record.extent])

    def _allocate(self, nbytes: int) -> Extent | None:
        if nbytes == 0:
            return None
        with contextlib.suppress(MemoryError):
            return self._allocator.allocate(nbytes)
        capacity = self._allocator.capacity_nbytes
        self._allocator.grow(capacity + max(capacity // 2, round_up(nbytes, IO_ALIGNMENT_NBYTES), _GROWTH_NBYTES))
        return self._allocator.allocate(nbytes)

    def _free(self, extents: Sequence[Extent | None]) -> None:
        for extent in extents:
            if extent is not None:
                self._allocator.free(extent)

    def _submit(
        self, kind: IoOperation, tensors: Sequence[torch.Tensor], extents: Sequence[Extent | None]
    ) -> list[IoTicket]:
        return self._engine.submit(
            [
                IoRequest(file=self._file, operation=kind, buffer=tensor.detach(), offset=extent.offset)
                for tensor, extent in zip(tensors, extents, strict=True)
                if extent is not None
            ]
        )

    def _finish(self, operation: _Operation) -> None:
        """Wait for an operation and handle its outcome."""
        error: OffloadIOError | None = None
        for ticket in operation.tickets:
            try:
                ticket.wait()
            except OffloadIOError as failure:
                error = error or failure
        self._operations.remove(operation)  # not earlier: the wait can be interrupted from the keyboard
        if error is not None:
            self._free(operation.extents)
            _release(operation.restored)
            raise error
        if operation.kind is IoOperation.WRITE:
            for tensor, extent in zip(operation.tensors, operation.extents, strict=True):
                self._record(tensor, extent)
            _release(operation.tensors)
        if operation.callback is not None:
            operation.callback()

    def _record(self, tensor: torch.Tensor, extent: Extent | None) -> None:
        key = id(tensor)
        previous = self._records.get(key)
        orphans = self._orphans
        tensor_ref = weakref.ref(tensor, lambda _: orphans.append(key))
        self._records[key] = _Record(tensor_ref=tensor_ref, extent=extent, nbytes=_nbytes_of(tensor))
        if previous is not None:
            self._free([previous.extent])

    def _finish_noting(self, operation: _Operation) -> None:
        try:
            self._finish(operation)
        except OffloadIOError as error:
            self._errors[operation.kind].append(error)

    def _poll(self) -> None:
        for operation in [*self._operations]:
            if all(ticket.is_done() for ticket in operation.tickets):
                self._finish_noting(operation)

    def _wait_for(self, kinds: Sequence[IoOperation]) -> None:
        with self._lock:
            for operation in [*self._operations]:
                if operation.kind in kinds:
                    self._finish_noting(operation)
            errors = [error for kind in kinds for error in self._errors[kind]]
            for kind in kinds:
                self._errors[kind].clear()
            for error in errors[1:]:
                _log.error("another failure of the same DiskOffloader: %s", error)
            if errors:
                raise errors[0]


def _nbytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _describe(tensor: torch.Tensor) -> str:
    return f"tensor of shape {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}"


def _check(tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TensorError(f"expected a tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise TensorError(f"expected a dense CPU tensor, got {_describe(tensor)}, {tensor.layout}; copy it first")
    if not tensor.is_contiguous():
        raise TensorError(f"expected a contiguous tensor, got {_describe(tensor)}, stride {tensor.stride()}")
    storage = tensor.untyped_storage()
    if tensor.storage_offset() != 0 or storage.nbytes() not in (0, _nbytes_of(tensor)):
        raise TensorError(
            f"expected a tensor that covers its storage, got a view: {_describe(tensor)} at element "
            f"{tensor.storage_offset()} of {storage.nbytes()} bytes; .clone() it first"
        )
    if not storage.resizable():
        raise TensorError(f"expected memory that torch can free, got {_describe(tensor)} on borrowed memory; clone it")


def _release(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def _remove_file(path: Path, pid: int) -> None:
    """Remove the file, unless this is the child of a fork."""
    if os.getpid() == pid:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
