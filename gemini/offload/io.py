"""Asynchronous reads and writes of tensors, on the native I/O engine.

Knows files, buffers and tickets. Must not know chunks, extents or the user of the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

try:
    from gemini._native import ffi, lib
except ModuleNotFoundError as error:  # this is the first module to need it
    raise ImportError(
        "gemini has a compiled part that is not built: pip install . in its directory, or python native/build.py"
    ) from error
from gemini.errors import CorruptRecordError, OffloadIOError
from gemini.kernels.spans import MAX_SPANS, Span, SpanRecorder, read_spans
from gemini.offload.io_backends import IoBackend, available_backends, choose_backend, explain_refusal, native_number
from gemini.offload.io_buffers import (
    IoBuffer,
    IoOpenFlag,
    IoOperation,
    IoStats,
    describe_buffer,
    empty_aligned,
)

__all__ = [
    "IoBackend",
    "IoBuffer",
    "IoEngine",
    "IoFile",
    "IoOpenFlag",
    "IoOperation",
    "IoRequest",
    "IoStats",
    "IoTicket",
    "available_backends",
    "choose_backend",
    "empty_aligned",
]

_log = logging.getLogger(__name__)

# A blocked native wait does not react to Ctrl-C or close(), so a wait is divided into slices of this length.
_WAIT_SLICE_NS = 50_000_000


_NATIVE_OPERATIONS = {IoOperation.READ: lib.GN_IO_READ, IoOperation.WRITE: lib.GN_IO_WRITE}

_HINTS = {
    errno.ENOSPC: "free space on that file system, or keep more in a faster tier",
    errno.EDQUOT: "the disk quota is used up: raise it, or keep more in a faster tier",
    errno.EFBIG: "the file size limit is reached: raise it (ulimit -f), or keep more in a faster tier",
    errno.EIO: "the device failed: look at the kernel log (dmesg) and at the health of the drive",
    errno.ENODATA: "the file ends before the bytes asked for: it was truncated or never written that far",
    errno.ECANCELED: "the engine was closed before this transfer was known to be complete",
    errno.EBADF: "the file is closed, or was not opened for this operation",
    errno.ESRCH: "the engine belongs to the parent process: open another one after a fork",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class IoRequest:
    """One transfer between memory and a file."""

    file: IoFile
    operation: IoOperation
    buffer: torch.Tensor | IoBuffer
    """CPU tensor, contiguous, any dtype; read only for a write, overwritten by a read."""
    offset: int
    """First byte in the file, counted from 0."""
    record: str = ""
    """Name of the content, for messages."""


class IoTicket:
    """The handle of one transfer; made only by an IoEngine.

    Args:
        engine: the engine that runs the transfer.
        request: the request.
        number: the native ticket.
        nbytes: length of the transfer.
    """

    __slots__ = (
        "_engine",
        "_file",
        "_is_over",
        "_nbytes",
        "_number",
        "_offset",
        "_operation",
        "_outcome",
        "_record",
    )

    def __init__(self, engine: IoEngine, request: IoRequest, number: int, nbytes: int) -> None:
        # - What was asked
        self._engine = engine
        self._file = request.file
        self._operation = request.operation
        self._offset = request.offset
        self._record = request.record
        self._number = number
        self._nbytes = nbytes
        # - What came of it
        self._is_over = False
        self._outcome = (0, 0)  # status and bytes done; valid once it is over

    @property
    def nbytes(self) -> int:
        """Length of the transfer."""
        return self._nbytes

    def is_done(self) -> bool:
        """Return whether the transfer has completed or failed; never blocks."""
        return self._is_over_within(0)

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the transfer is complete. May be called again, and from several threads.

        Args:
            timeout_s: maximum wait in seconds; None: no limit.

        Raises:
            OffloadIOError: the transfer failed or was cancelled by closing the engine.
            CorruptRecordError: a verified file does not hold the bytes that were written.
            TimeoutError: the transfer is still running.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._is_over_within(self._slice_ns(deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{self._operation.value} of {self._file.path} not complete after {timeout_s} s")
        status, nbytes_done = self._outcome
        if status != 0:
            kind = CorruptRecordError if status == -errno.EBADMSG else OffloadIOError
            raise kind(
                self._operation.value,
                self._file.path,
                -status,
                offset=self._offset,
                nbytes=self._nbytes,
                nbytes_done=nbytes_done,
                record=self._record,
                hint=_HINTS.get(-status, ""),
            )

    @staticmethod
    def _slice_ns(deadline: float | None) -> int:
        if deadline is None:
            return _WAIT_SLICE_NS
        return max(0, min(_WAIT_SLICE_NS, int((deadline - time.monotonic()) * 1e9)))

    def _is_over_within(self, timeout_ns: int) -> bool:
        if not self._is_over:
            outcome = self._engine._ask(self._number, timeout_ns)
            if outcome is None:
                return False
            self._outcome = outcome
            self._is_over = True
        return True


class IoFile:
    """An open file; made only by IoEngine.open.

    Args:
        engine: the engine that moves the bytes.
        path: the path, for messages.
        number: the native file number.
    """

    __slots__ = ("_engine", "_number", "path")

    def __init__(self, engine: IoEngine, path: str, number: int) -> None:
        self._engine = engine
        self._number = number
        self.path = path

    @property
    def is_direct(self) -> bool:
        """Whether aligned requests bypass the page cache; may turn False at the first such request."""
        with self._engine._borrow() as native:
            return bool(lib.gn_io_is_direct(native, self._number) == 1)

    def read(self, buffer: torch.Tensor | IoBuffer, offset: int) -> IoTicket:
        """Start filling a buffer from the file; see IoEngine.submit."""
        request = IoRequest(file=self, operation=IoOperation.READ, buffer=buffer, offset=offset)
        return self._engine.submit([request])[0]

    def write(self, buffer: torch.Tensor | IoBuffer, offset: int) -> IoTicket:
        """Start writing a buffer to the file; see IoEngine.submit."""
        request = IoRequest(file=self, operation=IoOperation.WRITE, buffer=buffer, offset=offset)
        return self._engine.submit([request])[0]

    def verify(self, nbytes: int) -> None:
        """Compare whole blocks of 4096 bytes that are read with what was last written there, by CRC-32C, from now on.

        Args:
            nbytes: length of the verified part, from the file's beginning; takes 4 bytes of memory per block.

        Raises:
            OffloadIOError: transfers are running (EBUSY), or the file is closed (EBADF).
        """
        with self._engine._borrow() as native:
            self._check("verify", lib.gn_io_verify(native, self._number, nbytes))

    def sync(self) -> None:
        """Block until written bytes are on the device (fdatasync).

        Raises:
            OffloadIOError: the device failed.
        """
        with self._engine._borrow() as native:
            self._check("sync", lib.gn_io_sync(native, self._number))

    def close(self) -> None:
        """Close the file.

        Raises:
            OffloadIOError: transfers are running (EBUSY), or the file is already closed (EBADF).
        """
        with self._engine._borrow() as native:
            self._check("close", lib.gn_io_close(native, self._number))

    def _check(self, operation: str, status: int) -> None:
        if status != 0:
            raise OffloadIOError(operation, self.path, -status, hint=_HINTS.get(-status, ""))


class IoEngine:
    """A queue to the kernel and the files opened through it. Thread-safe: any thread may call any method.

    Args:
        backend: kernel interface to use.
        queue_depth: maximum number of kernel requests in flight, 1..4096; further ones wait in the engine.
        num_threads: number of threads of IoBackend.THREADS; other backends ignore it.

    Raises:
        OffloadIOError: the kernel refuses, or a value is out of range.
    """

    def __init__(self, backend: IoBackend, *, queue_depth: int = 32, num_threads: int = 4) -> None:
        handle = ffi.new("gn_io **")
        status = lib.gn_io_create(handle, native_number(backend), queue_depth, num_threads)
        if status != 0:
            raise OffloadIOError("start I/O engine", backend.value, -status, hint=explain_refusal(backend))
        # - What it is
        self.backend = backend
        self._native = handle[0]
        self._pid = os.getpid()  # a forked child must not touch the lock, whose holder may not exist there
        # - Threads inside the native engine. Guarded by: `_condition`
        self._condition = threading.Condition()
        self._num_borrowers = 0
        self._is_closed = False  # no new call may enter the native engine
        self._is_destroyed = False  # no thread is in the native engine any more, and every outcome is known
        # - Transfers. Guarded by: `_condition`
        self._in_flight: dict[int, object] = {}  # ticket -> owner of its buffer, oldest first
        self._failures: dict[int, tuple[int, int]] = {}  # ticket -> (status, bytes done)
        self._unasked_failures: set[int] = set()
        self._stats = IoStats(nbytes_read=0, nbytes_written=0)
        self._recorder: SpanRecorder | None = None
        self._finalizer = weakref.finalize(self, _destroy, self._native, self._in_flight)

    def open(
        self, path: str | os.PathLike[str], flags: IoOpenFlag = IoOpenFlag.READ, *, descriptor: int | None = None
    ) -> IoFile:
        """Open a file.

        Args:
            path: the file's path; files are created with mode 0600.
            flags: READ, WRITE or both, with CREATE, TRUNCATE and DIRECT as needed.
            descriptor: descriptor of the file to reopen, wherever it is now; `path` is then used only in messages.

        Returns:
            The file; the engine closes it when it is closed itself.

        Raises:
            OffloadIOError: the file cannot be opened in this way.
        """
        name = os.fsdecode(path)
        opened = name if descriptor is None else f"/proc/self/fd/{descriptor}"
        with self._borrow() as native:
            number = lib.gn_io_open(native, os.fsencode(opened), int(flags))
        if number < 0:
            raise OffloadIOError("open", name, -number, hint=_HINTS.get(-number, ""))
        return IoFile(self, name, number)

    def submit(self, requests: Sequence[IoRequest]) -> list[IoTicket]:
        """Start a batch of transfers; does not wait for the device.

        The engine keeps every buffer alive until its transfer is complete. Transfers of different tickets may
        complete in any order, even on the same bytes.

        Args:
            requests: the transfers.

        Returns:
            One ticket per request, in the same order.

        Raises:
            ValueError: a tensor is not contiguous or not on the CPU, or an offset is negative; nothing was started.
            OffloadIOError: a file is closed or not open for this operation; nothing was started.
        """
        if not requests:
            return []
        buffers = [describe_buffer(request.buffer) for request in requests]
        native_requests = ffi.new("gn_io_request[]", len(requests))
        for native_request, request, buffer in zip(native_requests, requests, buffers, strict=True):
            if request.offset < 0 or buffer.nbytes < 0:
                raise ValueError(f"expected offset and length >= 0, got {request.offset} and {buffer.nbytes}")
            if request.file._engine is not self:
                raise ValueError(f"{request.file.path} was opened by another engine")
            native_request.file = request.file._number
            native_request.op = _NATIVE_OPERATIONS[request.operation]
            native_request.buffer = ffi.cast("void *", buffer.address)
            native_request.nbytes = buffer.nbytes
            native_request.offset = request.offset
        numbers = ffi.new("uint64_t[]", len(requests))
        with self._borrow() as native, self._condition:
            status = lib.gn_io_submit(native, native_requests, len(requests), numbers)
            if status != 0:
                first = requests[0]
                hint = _HINTS.get(-status, "")
                raise OffloadIOError(f"submit a {first.operation.value} of", first.file.path, -status, hint=hint)
            for number, buffer in zip(numbers, buffers, strict=True):
                self._in_flight[number] = buffer.owner
            self._drop_completed(2 * len(requests))
        if self._recorder is not None:
            for number, request, buffer in zip(numbers, requests, buffers, strict=True):
                operation = request.operation.value
                self._recorder.submitted(self, number, operation=operation, record=request.record, nbytes=buffer.nbytes)
        return [
            IoTicket(self, request, number, buffer.nbytes)
            for request, number, buffer in zip(requests, numbers, buffers, strict=True)
        ]

    def stats(self) -> IoStats:
        """Return the bytes moved since creation, or, after close(), until then."""
        with self._condition:
            return self._stats if self._is_destroyed else self._read_stats()

    def record_to(self, recorder: SpanRecorder | None) -> None:
        """Report every transfer to a recorder from now on and keep its times for `take_spans`; None: stop."""
        self._recorder = recorder
        with self._borrow() as native:
            lib.gn_io_keep_spans(native, 0 if recorder is None else MAX_SPANS)

    def take_spans(self) -> list[Span]:
        """Return the spans of transfers that completed since the last call, in order of completion."""
        with self._borrow() as native:
            return read_spans(lambda spans, count: lib.gn_io_take_spans(native, spans, count))

    def close(self) -> None:
        """Complete what the kernel has taken, cancel the rest, close the files. Closing again does nothing.

        A ticket not known to be complete then fails with ECANCELED. Does nothing in a forked child.
        """
        if os.getpid() != self._pid:
            return
        with self._condition:
            if self._is_closed:
                self._condition.wait_for(lambda: self._is_destroyed)
                return
            self._is_closed = True
            self._condition.wait_for(lambda: self._num_borrowers == 0)
            self._drop_completed(len(self._in_flight))
            if self._unasked_failures:
                _log.warning("I/O engine closed with %d unreported failed transfers", len(self._unasked_failures))
            self._failures.update(dict.fromkeys(self._in_flight, (-errno.ECANCELED, 0)))
            self._stats = self._read_stats()
            self._finalizer()
            self._is_destroyed = True
            self._condition.notify_all()

    def __enter__(self) -> IoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _borrow(self) -> Iterator[object]:
        # close() waits for the borrowers, so that no thread is inside the native engine when it goes.
        if os.getpid() != self._pid:
            raise OffloadIOError("use I/O engine", self.backend.value, errno.ESRCH, hint=_HINTS[errno.ESRCH])
        with self._condition:
            if self._is_closed:
                raise OffloadIOError("use I/O engine", self.backend.value, errno.EBADF, hint="it was closed before")
            self._num_borrowers += 1
        try:
            yield self._native
        finally:
            with self._condition:
                self._num_borrowers -= 1
                self._condition.notify_all()

    def _ask(self, number: int, timeout_ns: int) -> tuple[int, int] | None:
        """Return (status, bytes done) of a ticket, or None if it is not complete after `timeout_ns`."""
        if os.getpid() != self._pid:
            return (-errno.ESRCH, 0)
        with self._condition:
            if self._is_closed:
                self._condition.wait_for(lambda: self._is_destroyed)
                return self._failures.get(number, (0, 0))
        result = ffi.new("gn_io_result *")
        try:
            with self._borrow() as native:
                status = lib.gn_io_wait(native, number, timeout_ns, result)
        except OffloadIOError:
            return None  # closed meanwhile: the next question finds the outcome
        if status == -errno.ETIMEDOUT and result.status == 0:
            return None
        with self._condition:
            self._in_flight.pop(number, None)
            self._unasked_failures.discard(number)
            if status != 0:
                self._failures[number] = (status, result.nbytes_done)
        return status, result.nbytes_done

    def _drop_completed(self, max_count: int) -> None:
        """Release the oldest buffers whose transfers are complete. Guarded by: `_condition`, which the caller holds."""
        result = ffi.new("gn_io_result *")
        while self._in_flight and max_count > 0:
            number = next(iter(self._in_flight))
            status = lib.gn_io_wait(self._native, number, 0, result)
            if status == -errno.ETIMEDOUT and result.status == 0:
                return
            del self._in_flight[number]
            if status != 0:
                self._failures[number] = (status, result.nbytes_done)
                self._unasked_failures.add(number)
            max_count -= 1

    def _read_stats(self) -> IoStats:
        counts = ffi.new("int64_t[2]")
        lib.gn_io_stats(self._native, counts, counts + 1)
        return IoStats(nbytes_read=counts[0], nbytes_written=counts[1])


def _destroy(native: object, in_flight: dict[int, object]) -> None:
    """Destroy a native engine, then release the buffers that it may have used until then."""
    lib.gn_io_destroy(native)
    in_flight.clear()
