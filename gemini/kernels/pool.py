"""A pool of native threads that run kernels beside Python.

Jobs take tensors by address; the pool keeps those tensors alive until the job has completed. It knows no chunks. A
process that is forked after the pool's construction has no pool threads, and every use there is refused.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from torch import Tensor

from gemini._native import ffi, lib
from gemini.errors import WorkerError
from gemini.kernels.adam_tile import AdamTile
from gemini.kernels.cpu import (
    GradMode,
    Isa,
    address_of,
    check_status,
    make_adam_args,
    make_grad_args,
    make_sum_args,
)
from gemini.kernels.journal import TileJournal, make_journal_args
from gemini.kernels.spans import MAX_SPANS, Span, SpanRecorder, read_spans
from gemini.kernels.topology import choose_worker_cpus, read_launching_core, read_topology

__all__ = ["BACKGROUND_PRIORITY", "GradTicket", "SweepTicket", "Ticket", "WorkerPool"]

BACKGROUND_PRIORITY: int = lib.GN_PRIORITY_BACKGROUND
"""Lowest priority number of background jobs; see `WorkerPool.limit_background`."""

# A wait is cut into slices so that Python can handle signals, such as Ctrl-C, between them.
WAIT_SLICE_S = 0.1
# Completed jobs without a wait may keep this many sets of tensors alive.
MIN_RETAINED_JOBS = 16


class Ticket:
    """A submitted job. Thread-safe."""

    def __init__(self, pool: WorkerPool, number: int, description: str) -> None:
        self._pool = pool
        self._number = number
        self._description = description

    def wait(self, timeout_s: float | None = None) -> None:
        """Block, without the interpreter lock, until the job has completed.

        Args:
            timeout_s: maximum wait in seconds; None: no limit.

        Raises:
            TimeoutError: the job has not completed in time; it continues.
            WorkerError: the pool was closed before the job began.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        status = -errno.ETIMEDOUT
        while status == -errno.ETIMEDOUT:
            slice_s = WAIT_SLICE_S
            if deadline_s is not None:
                slice_s = max(0.0, min(slice_s, deadline_s - time.monotonic()))
            status = self._pool._poll(self._number, slice_s)
            if status == -errno.ETIMEDOUT and slice_s == 0.0:
                raise TimeoutError(f"{self._description} (ticket {self._number}) not done within {timeout_s} s")
        if status == -errno.ECANCELED:
            raise WorkerError(
                f"{self._description} (ticket {self._number}) was cancelled: the worker pool was closed before it "
                "began; wait for tickets before closing the pool"
            )
        if status != 0:
            raise WorkerError(f"{self._description} (ticket {self._number}) failed: {os.strerror(-status)}")

    def is_done(self) -> bool:
        """Return whether wait() would return or raise at once, without a timeout."""
        return self._pool._poll(self._number, 0.0) != -errno.ETIMEDOUT


class GradTicket(Ticket):
    """A submitted gradient job, whose result is a sum of squares."""

    def __init__(self, pool: WorkerPool, number: int, description: str, sumsq: Any) -> None:
        super().__init__(pool, number, description)
        self._sumsq = sumsq  # double *, written when the job completes

    def sumsq(self) -> float:
        """Wait, then return the sum of squares that store_gradient would have returned.

        Returns:
            Sum of squares of the stored gradient.

        Raises:
            WorkerError: the pool was closed before the job began.
        """
        self.wait()
        return float(self._sumsq[0])


class SweepTicket(Ticket):
    """A submitted sweep, whose result is a checksum."""

    def __init__(self, pool: WorkerPool, number: int, description: str, checksum: Any) -> None:
        super().__init__(pool, number, description)
        self._checksum = checksum  # uint64_t *, written when the job completes

    def checksum(self) -> int:
        """Wait, then return the checksum.

        Returns:
            XOR of all 64-bit words that were read, each tensor zero padded to whole words.

        Raises:
            WorkerError: the pool was closed before the job began.
        """
        self.wait()
        return int(self._checksum[0])


class WorkerPool:
    """A fixed set of native threads. Jobs with a lower priority number start first, jobs of one priority in order.

    Tensors of a job must not be touched until its ticket has completed. Closing cancels jobs that have not begun;
    tickets stay valid after that. In a process that is forked later every method but `close` raises WorkerError.

    Args:
        num_threads: threads to start, at least 1.
        isa: instruction set of the kernels; results are the same for all.
        cpus: processors that the threads may use; empty: `choose_worker_cpus` chooses. Refusals by the system are
            ignored.

    Raises:
        ValueError: num_threads is out of range.
        ConfigError: the machine lacks this instruction set.
        WorkerError: the system refuses the threads; none keeps running.
    """

    def __init__(self, num_threads: int, *, isa: Isa = Isa.AUTO, cpus: Sequence[int] = ()) -> None:
        check_status(lib.gn_isa_check(isa.code), "WorkerPool", isa)
        if not 1 <= num_threads <= 4096:
            raise ValueError(f"WorkerPool: num_threads: expected 1 to 4096, got {num_threads}")
        handle = ffi.new("gn_pool **")
        status = lib.gn_pool_create(handle, num_threads)
        if status != 0:
            raise WorkerError(
                f"cannot start {num_threads} worker threads: {os.strerror(-status)} (errno {-status}); lower "
                "GeminiConfig.num_threads or raise the limits on processes (ulimit -u, pids.max) and memory"
            )
        # - The native threads
        self._num_threads = num_threads
        self._process_id = os.getpid()
        self._isa = isa
        # Tickets refer to the pool, so the native object outlives every question about a ticket.
        self._handle = ffi.gc(handle[0], lib.gn_pool_destroy)
        self._close_lock = threading.Lock()
        self._recorder: SpanRecorder | None = None
        # - The limit on background jobs. Guarded by: `_lock`
        self._lock = threading.Lock()
        self._background_threads = num_threads
        self._num_background_waiters = 0
        # - Tensors of jobs. Guarded by: `_lock`
        self._retained: dict[int, tuple[object, ...]] = {}
        self._sweep_at = MIN_RETAINED_JOBS
        self._place_threads(cpus)

    @property
    def num_threads(self) -> int:
        """Number of threads."""
        return self._num_threads

    def submit_adam(
        self, tile: AdamTile, *, journal: TileJournal | None = None, priority: int = 0, record: str = ""
    ) -> Ticket:
        """Queue one Adam update; see adam_update.

        Args:
            tile: tensors and hyper-parameters; the segments are copied.
            journal: memory that notes the progress, so that the process may end meanwhile; None: not noted.
            priority: lower starts first.
            record: name of the updated object, for recordings.

        Returns:
            The job's ticket.

        Raises:
            ValueError: the journal has fewer scratches than the pool has threads.
            WorkerError: the pool is closed.
        """
        args, _segments = make_adam_args(tile, self._isa)
        if journal is None:
            number = self._submit("adam update", lib.gn_pool_submit_adam, (args, priority), (tile,))
        else:
            journalled = (args, make_journal_args(journal), priority)
            submit_fn = lib.gn_pool_submit_adam_journalled
            number = self._submit("adam update", submit_fn, journalled, (tile, journal))
        self._note(number, "adam update", record, tile.working.nbytes)
        return Ticket(self, number, "adam update")

    def submit_gradient(
        self, dst: Tensor | None, src: Tensor, *, mode: GradMode = GradMode.STORE, priority: int = 0, record: str = ""
    ) -> GradTicket:
        """Queue one gradient; see store_gradient.

        Args:
            dst: the gradient's destination; None: only the sum of squares is computed.
            src: the gradient; read only.
            mode: store or add.
            priority: lower starts first.
            record: name of the gradient's owner, for recordings.

        Returns:
            The job's ticket, which gives the sum of squares.

        Raises:
            ValueError: a tensor is not 1D contiguous on the CPU, or dtypes, lengths or mode do not fit.
            WorkerError: the pool is closed.
        """
        sumsq = ffi.new("double *")
        args = make_grad_args(dst, src, mode, self._isa, sumsq)
        number = self._submit("gradient", lib.gn_pool_submit_grad, (args, priority), (dst, src, sumsq))
        self._note(number, "gradient", record, src.nbytes)
        return GradTicket(self, number, "gradient", sumsq)

    def submit_copy(
        self, dst: Tensor, src: Tensor, *, priority: int = 0, operation: str = "copy", record: str = ""
    ) -> Ticket:
        """Queue a copy of bytes between contiguous CPU tensors of any dtype and shape.

        Args:
            dst: tensor of as many bytes as src; overwritten; must not overlap src.
            src: read only.
            priority: lower starts first.
            operation: name of the operation, for recordings.
            record: name of the content, for recordings.

        Returns:
            The job's ticket.

        Raises:
            ValueError: a tensor is not contiguous on the CPU, or the byte counts differ.
            WorkerError: the pool is closed.
        """
        _check_bytes("submit_copy: dst", dst)
        _check_bytes("submit_copy: src", src)
        if dst.nbytes != src.nbytes:
            raise ValueError(f"submit_copy: dst has {dst.nbytes} bytes, src has {src.nbytes}; expected as many")
        args = (address_of(dst), address_of(src), src.nbytes, priority)
        number = self._submit("copy", lib.gn_pool_submit_copy, args, (dst, src))
        self._note(number, operation, record, src.nbytes)
        return Ticket(self, number, "copy")

    def submit_sum(
        self, dst: Tensor, parts: Sequence[Tensor], *, divisor: int = 1, priority: int = 0, record: str = ""
    ) -> Ticket:
        """Queue a sum of tensors in their order; see sum_parts.

        Args:
            dst: the sum's destination.
            parts: what is added; read only.
            divisor: divides the sum.
            priority: lower starts first.
            record: name of the content, for recordings.

        Returns:
            The job's ticket.

        Raises:
            ValueError: as sum_parts.
            WorkerError: the pool is closed.
        """
        args, _pointers = make_sum_args(dst, parts, divisor, self._isa)
        number = self._submit("sum", lib.gn_pool_submit_sum, (args, priority), (dst, *parts))
        self._note(number, "sum", record, len(parts) * parts[0].nbytes)
        return Ticket(self, number, "sum")

    def submit_populate(self, memory: Tensor, *, priority: int = 0) -> Ticket:
        """Queue the first touch of fresh private memory: its pages exist afterwards, with unchanged content.

        Unlike other jobs, it permits its memory to be written to meanwhile.

        Args:
            memory: uint8, page aligned, on the CPU.
            priority: lower starts first.

        Returns:
            The job's ticket.

        Raises:
            ValueError: the tensor is not contiguous on the CPU.
            WorkerError: the pool is closed.
        """
        _check_bytes("submit_populate: memory", memory)
        args = (address_of(memory), memory.nbytes, priority)
        return Ticket(self, self._submit("populate", lib.gn_pool_submit_populate, args, (memory,)), "populate")

    def submit_sweep(self, read: Sequence[Tensor], inverted: Sequence[Tensor], *, priority: int = 0) -> SweepTicket:
        """Queue one pass over several tensors at once, each in proportion to its length, without arithmetic.

        The time it takes is what memory needs to deliver these bytes to these threads: the ceiling of a kernel that
        reads the same tensors and writes some of them.

        Args:
            read: contiguous CPU tensors of any dtype and shape; read only.
            inverted: likewise; every byte is replaced by its complement, so that a second sweep restores it.
            priority: lower starts first.

        Returns:
            The job's ticket, which gives the checksum of what was read.

        Raises:
            ValueError: a tensor is not contiguous on the CPU.
            WorkerError: the pool is closed.
        """
        tensors = (*read, *inverted)
        buffers = ffi.new("gn_sweep_buffer[]", len(tensors))
        for index, tensor in enumerate(tensors):
            _check_bytes("submit_sweep: tensor", tensor)
            mode = lib.GN_SWEEP_READ if index < len(read) else lib.GN_SWEEP_INVERT
            buffers[index].data, buffers[index].nbytes, buffers[index].mode = address_of(tensor), tensor.nbytes, mode
        checksum = ffi.new("uint64_t *")
        args = (buffers, len(tensors), checksum, priority)
        number = self._submit("sweep", lib.gn_pool_submit_sweep, args, (tensors, checksum))
        return SweepTicket(self, number, "sweep", checksum)

    def record_to(self, recorder: SpanRecorder | None) -> None:
        """Report every job to a recorder from now on and keep its times for `take_spans`; None: stop."""
        self._recorder = recorder
        lib.gn_pool_keep_spans(self._handle, 0 if recorder is None else MAX_SPANS)

    def take_spans(self) -> list[Span]:
        """Return the spans of jobs that completed since the last call, in order of completion."""
        return read_spans(lambda spans, count: lib.gn_pool_take_spans(self._handle, spans, count))

    def limit_background(self, max_threads: int) -> None:
        """Limit the number of threads that run jobs of BACKGROUND_PRIORITY and above at the same time.

        A limit leaves processors to the process's other work; other jobs keep all threads. It takes effect at the next
        block of a job, in well under a millisecond.

        Args:
            max_threads: at least 1; `num_threads` and more mean no limit.

        Raises:
            ValueError: max_threads is below 1.
            WorkerError: this is a forked process.
        """
        if max_threads < 1:
            raise ValueError(f"limit_background: max_threads: expected at least 1, got {max_threads}")
        self._change_background(max_threads=max_threads)

    @contextmanager
    def background_unlimited(self) -> Iterator[None]:
        """Lift the limit on background jobs while the calling thread has nothing to do but wait for them."""
        self._change_background(waiters=1)
        try:
            yield
        finally:
            self._change_background(waiters=-1)

    def close(self) -> None:
        """Cancel jobs that have not begun, finish running ones, end the threads. Blocking; a second call does nothing.

        In a forked process it does nothing.
        """
        if self._is_foreign():
            return
        with self._close_lock:
            lib.gn_pool_shutdown(self._handle)
        with self._lock:
            self._retained.clear()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(
        self, operation: str, submit_fn: Callable[..., int], args: tuple[Any, ...], retained: tuple[object, ...]
    ) -> int:
        self._check_process()
        number = ffi.new("uint64_t *")
        # Under the lock, so that close() cannot come between the two lines and leave a tensor retained.
        with self._lock:
            status = submit_fn(self._handle, *args, number)
            if status == 0:
                self._retained[int(number[0])] = retained
        if status == -errno.ECANCELED:
            raise WorkerError(f"cannot submit {operation}: the worker pool is closed")
        check_status(status, operation, self._isa)
        if len(self._retained) >= self._sweep_at:
            self._sweep()
        return int(number[0])

    def _note(self, number: int, operation: str, record: str, nbytes: int) -> None:
        if self._recorder is not None:
            self._recorder.submitted(self, number, operation=operation, record=record, nbytes=nbytes)

    def _place_threads(self, cpus: Sequence[int]) -> None:
        """Restrict each thread to its processors."""
        if not hasattr(os, "sched_setaffinity"):
            return
        topology = read_topology()
        chosen = choose_worker_cpus(topology, self._num_threads, read_launching_core())
        if cpus:
            chosen = (frozenset(cpus) & topology.cpus,) * self._num_threads
        thread_ids = ffi.new("int32_t[]", self._num_threads)
        lib.gn_pool_thread_ids(self._handle, thread_ids)
        for thread_id, worker_cpus in zip(thread_ids, chosen, strict=True):
            if worker_cpus and worker_cpus != topology.cpus:
                with suppress(OSError):
                    os.sched_setaffinity(thread_id, worker_cpus)

    def _change_background(self, *, max_threads: int | None = None, waiters: int = 0) -> None:
        self._check_process()
        with self._lock:
            self._background_threads = max_threads or self._background_threads
            self._num_background_waiters += waiters
            limit = self._num_threads if self._num_background_waiters else self._background_threads
            lib.gn_pool_limit_background(self._handle, limit)

    def _is_foreign(self) -> bool:
        return os.getpid() != self._process_id

    def _check_process(self) -> None:
        """Refuse use in a forked process, before any lock that may have been held when it was forked."""
        if self._is_foreign():
            raise WorkerError(
                f"the worker pool belongs to process {self._process_id}; this is process {os.getpid()}, forked from it "
                "without its threads: use the engine where it was built, or start this process by spawning"
            )

    def _poll(self, number: int, timeout_s: float) -> int:
        """Wait for a ticket; release its tensors if it has completed."""
        self._check_process()
        status = int(lib.gn_pool_wait(self._handle, number, int(timeout_s * 1e9)))
        if status != -errno.ETIMEDOUT:
            with self._lock:
                self._retained.pop(number, None)
        return status

    def _sweep(self) -> None:
        """Release the tensors of completed jobs; doubling the mark makes this cheap per job."""
        with self._lock:
            numbers = list(self._retained)
        for number in numbers:
            self._poll(number, 0.0)
        self._sweep_at = max(MIN_RETAINED_JOBS, 2 * len(self._retained))


def _check_bytes(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose bytes are not one run of host memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        found = f"shape {list(tensor.shape)}, stride {list(tensor.stride())} on {tensor.device}"
        raise ValueError(f"{name}: expected a contiguous CPU tensor, got {found}")
