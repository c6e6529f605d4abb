"""Transport of bytes between host memory and compute memory.

There are three implementations of one interface: the CPU (compute memory is host memory, so nothing is copied), the
simulated device (host memory that acts as a device, copied by the worker pool) and accelerators (copies on separate
streams, ordered by events). Code outside this module does not know which one it uses.

[Note: Which compute a copy follows]
A copy must not overwrite device memory that compute still reads, nor read what compute has not written yet. In the
thread that computes, this means "everything that its current stream has been given so far". Another thread has another
current stream, the default one, which knows nothing of a training loop under `torch.cuda.stream(...)`. Where both are
the default stream, "so far" includes what forward was given in the meantime, and the copy would wait for that without
need. So code that lets another thread copy first takes a `mark`, in the thread that computes, and passes it on.
"""

from __future__ import annotations

import mmap
import threading
from typing import Protocol

import torch

from gemini.errors import OutOfTierMemoryError
from gemini.kernels.pool import Ticket, WorkerPool
from gemini.kernels.spans import Span, SpanRecorder
from gemini.offload.accelerator import Accelerator, Event, Stream
from gemini.offload.arena import HostArena
from gemini.offload.device_spans import DeviceSpans
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, TierLedger, format_nbytes, round_up

__all__ = ["CpuTransfers", "Mark", "Move", "SimulatedTransfers", "StreamTransfers", "Traffic", "Transfers"]

Mark = object
"""Point in the sequence of submitted compute; its content is known only to the transfers that made it."""


class Traffic:
    """Bytes and copies between host and device since construction. Thread-safe."""

    def __init__(self) -> None:
        self.uploaded_nbytes = 0
        self.num_uploads = 0
        self.downloaded_nbytes = 0
        self.num_downloads = 0
        self._lock = threading.Lock()

    def count_upload(self, nbytes: int) -> None:
        """Count one copy from host to device memory."""
        with self._lock:
            self.uploaded_nbytes += nbytes
            self.num_uploads += 1

    def count_download(self, nbytes: int) -> None:
        """Count one copy from device to host memory."""
        with self._lock:
            self.downloaded_nbytes += nbytes
            self.num_downloads += 1


class Move(Protocol):
    """A running copy."""

    def is_done(self) -> bool:
        """Return whether the host may reuse both buffers."""

    def wait_on_host(self) -> None:
        """Block until the copy has ended."""

    def wait_on_compute(self) -> None:
        """Make compute that is submitted from now on wait for the result; blocks only if the host itself computes."""


class Transfers(Protocol):
    """A compute device's memory and the copies to and from it."""

    device: torch.device
    """Device of the tensors that forward and backward use."""
    compute_tier: MemoryTier
    """DEVICE, or HOST where compute memory is host memory."""
    traffic: Traffic
    """Counters of copies."""

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] of compute memory with its own storage."""

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Free compute memory; copies and kernels that were already submitted may still use it."""

    def mark(self) -> Mark:
        """Mark what the calling thread has submitted to compute so far."""

    def upload(self, dst: torch.Tensor, src: torch.Tensor, *, after: Mark | None = None, record: str = "") -> Move:
        """Start a copy from host to compute memory.

        Args:
            dst: compute memory.
            src: host memory of as many bytes; unchanged until the host has seen the copy end.
            after: compute that the copy follows; None: everything that the calling thread has submitted so far. Needed
                in a thread that does not compute; see [Note: Which compute a copy follows].
            record: name of the content, for recordings.

        Returns:
            The copy.
        """

    def download(self, dst: torch.Tensor, src: torch.Tensor, *, record: str = "") -> Move:
        """Start a copy from compute to host memory, after all compute that the calling thread has submitted so far."""

    def synchronize(self) -> None:
        """Block until everything submitted to the device has ended."""


class CpuTransfers:
    """Compute memory is host memory: buffers come from the arena and nothing is ever copied.

    Args:
        arena: the source of all memory.
    """

    device = torch.device("cpu")
    compute_tier = MemoryTier.HOST

    def __init__(self, arena: HostArena) -> None:
        self.traffic = Traffic()
        self._arena = arena

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] from the arena."""
        return self._arena.allocate(nbytes, purpose)

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Give the buffer back to the arena."""
        self._arena.free(buffer)

    def mark(self) -> Mark:
        """Return an empty mark: compute on the CPU is synchronous."""
        return None

    def upload(self, dst: torch.Tensor, src: torch.Tensor, *, after: Mark | None = None, record: str = "") -> Move:
        """Never called: host memory is compute memory."""
        raise AssertionError("the CPU has no device memory to copy to")

    def download(self, dst: torch.Tensor, src: torch.Tensor, *, record: str = "") -> Move:
        """Never called: host memory is compute memory."""
        raise AssertionError("the CPU has no device memory to copy from")

    def synchronize(self) -> None:
        """Return at once: compute on the CPU is synchronous."""


class SimulatedTransfers:
    """Host memory that acts as a device: it has a budget and buffers, and the worker pool copies asynchronously.

    Args:
        ledger: charged for device memory.
        pool: runs the copies.
    """

    device = torch.device("cpu")
    compute_tier = MemoryTier.DEVICE

    def __init__(self, ledger: TierLedger, pool: WorkerPool) -> None:
        self.traffic = Traffic()
        self._ledger = ledger
        self._pool = pool

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] charged to the device."""
        nbytes = round_up(max(nbytes, 1), IO_ALIGNMENT_NBYTES)
        self._ledger.charge(MemoryTier.DEVICE, purpose, nbytes)
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Free a buffer and credit the device."""
        self._ledger.credit(MemoryTier.DEVICE, purpose, buffer.numel())

    def mark(self) -> Mark:
        """Return an empty mark: compute on the CPU is synchronous."""
        return None

    def upload(self, dst: torch.Tensor, src: torch.Tensor, *, after: Mark | None = None, record: str = "") -> Move:
        """Start a copy in the worker pool."""
        self.traffic.count_upload(src.nbytes)
        return _PoolMove(self._pool.submit_copy(dst, src, operation="upload", record=record))

    def download(self, dst: torch.Tensor, src: torch.Tensor, *, record: str = "") -> Move:
        """Start a copy in the worker pool."""
        self.traffic.count_download(src.nbytes)
        return _PoolMove(self._pool.submit_copy(dst, src, operation="download", record=record))

    def synchronize(self) -> None:
        """Return at once: compute on the CPU is synchronous."""


class _PoolMove:
    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def is_done(self) -> bool:
        return self._ticket.is_done()

    def wait_on_host(self) -> None:
        self._ticket.wait()

    wait_on_compute = wait_on_host


class StreamTransfers:
    """An accelerator: uploads and downloads run on their own streams behind events.

    Compute is the stream that is current when a method is called. Both directions start after what that stream has been
    given so far, so a buffer may be refilled as soon as its last user was *submitted*.

    Args:
        accelerator: the device; it need not be the current one.
        ledger: charged for device memory.
    """

    compute_tier = MemoryTier.DEVICE

    def __init__(self, accelerator: Accelerator, ledger: TierLedger) -> None:
        self.device = accelerator.device
        self.traffic = Traffic()
        self._accelerator = accelerator
        self._ledger = ledger
        self._upload_stream = accelerator.new_stream()
        self._download_stream = accelerator.new_stream()
        self._refresh_stream = accelerator.new_stream()
        """Stream of uploads behind a mark, which must not queue behind a prefetch that waits for later compute."""
        self._recorder: SpanRecorder | None = None
        self._spans: DeviceSpans | None = None

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] from torch's caching allocator.

        Args:
            nbytes: bytes needed.
            purpose: the ledger's name for the purpose of the bytes.

        Returns:
            The buffer; its memory belongs to the stream that is current now.

        Raises:
            OutOfTierMemoryError: the budget or the device does not have the bytes.
        """
        nbytes = round_up(max(nbytes, 1), IO_ALIGNMENT_NBYTES)
        self._ledger.charge(MemoryTier.DEVICE, purpose, nbytes)
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            self._ledger.credit(MemoryTier.DEVICE, purpose, nbytes)
            raise OutOfTierMemoryError(
                f"{self.device} refused {format_nbytes(nbytes)} for {purpose}, which device_budget allows: {error}; "
                "lower device_budget by what others take on the device"
            ) from error

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Free the memory for the caching allocator when compute and both copy streams have finished with it."""
        copies = (self._upload_stream, self._download_stream, self._refresh_stream)
        for stream in (self._accelerator.current_stream(), *copies):
            buffer.record_stream(stream)  # type: ignore[arg-type]  # a torch.Stream
        self._ledger.credit(MemoryTier.DEVICE, purpose, buffer.numel())

    def mark(self) -> Mark:
        """Record an event on the current stream."""
        return self._accelerator.record_event()

    def upload(self, dst: torch.Tensor, src: torch.Tensor, *, after: Mark | None = None, record: str = "") -> Move:
        """Start a copy on the upload stream, after `after` or else after the calling thread's current stream."""
        self.traffic.count_upload(src.nbytes)
        stream = self._upload_stream if after is None else self._refresh_stream
        after = self.mark() if after is None else after
        return self._copy(stream, dst, src, after=after, operation="upload", record=record)

    def download(self, dst: torch.Tensor, src: torch.Tensor, *, record: str = "") -> Move:
        """Start a copy on the download stream."""
        self.traffic.count_download(src.nbytes)
        return self._copy(self._download_stream, dst, src, after=self.mark(), operation="download", record=record)

    def record_to(self, recorder: SpanRecorder | None) -> None:
        """Report every copy to a recorder from now on and keep its times for `take_spans`; None: stop."""
        self._spans = None if recorder is None else DeviceSpans(self._timed_event)
        self._recorder = recorder

    def take_spans(self) -> list[Span]:
        """Return the spans of copies that ended since the last call."""
        return [] if self._spans is None else self._spans.take()

    def _timed_event(self) -> Event:
        return self._accelerator.record_event(is_timed=True)

    def _copy(
        self,
        stream: Stream,
        dst: torch.Tensor,
        src: torch.Tensor,
        *,
        after: Mark,
        operation: str,
        record: str,
    ) -> Move:
        stream.wait_event(after)
        with self._accelerator.using(stream), torch.no_grad():
            recorder, spans = self._recorder, self._spans
            begin = None if spans is None else spans.begin()
            dst.copy_(src, non_blocking=True)
            if recorder is not None and spans is not None and begin is not None:
                recorder.submitted(self, spans.end(begin), operation=operation, record=record, nbytes=src.nbytes)
            event = self._accelerator.record_event()
        return _StreamMove(event, self._accelerator)

    def synchronize(self) -> None:
        """Block until the device is idle."""
        self._accelerator.synchronize()


class _StreamMove:
    def __init__(self, event: Event, accelerator: Accelerator) -> None:
        self._event = event
        self._accelerator = accelerator

    def is_done(self) -> bool:
        return bool(self._event.query())

    def wait_on_host(self) -> None:
        self._event.synchronize()

    def wait_on_compute(self) -> None:
        self._accelerator.current_stream().wait_event(self._event)
