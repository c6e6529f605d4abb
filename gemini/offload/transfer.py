"""How bytes travel between host memory and compute memory.

Three engines with one interface: the CPU (compute memory is host memory, nothing travels), the simulated
device (host memory that plays a device, copied by the worker pool) and CUDA (copies on streams of their own,
ordered by events). Nothing outside this module knows which one it talks to.
"""

from __future__ import annotations

import mmap
from typing import Protocol

import torch

from gemini.kernels.pool import Ticket, WorkerPool
from gemini.offload.arena import HostArena
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, TierLedger, round_up

__all__ = ["CpuTransfers", "CudaTransfers", "Move", "SimulatedTransfers", "Transfers"]


class Move(Protocol):
    """One copy under way."""

    def is_done(self) -> bool:
        """Return whether both buffers may be reused by the host."""

    def wait_on_host(self) -> None:
        """Block until the copy has ended."""

    def wait_on_compute(self) -> None:
        """Make compute submitted from now on see the result; blocks only where compute is the host itself."""


class Transfers(Protocol):
    """A compute device's memory and the copies to and from it."""

    device: torch.device
    """Where tensors that forward and backward use are."""
    compute_tier: MemoryTier
    """DEVICE, or HOST where compute memory is host memory."""

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] of compute memory with a storage of its own."""

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Give compute memory back; copies and kernels already submitted may still use it."""

    def upload(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Start a copy from host to compute memory, after all compute submitted so far."""

    def download(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Start a copy from compute to host memory, after all compute submitted so far."""

    def synchronize(self) -> None:
        """Block until everything submitted to the device has ended."""


class CpuTransfers:
    """Compute memory is host memory: buffers come from the arena and nothing is ever copied.

    Args:
        arena: source of all memory.
    """

    device = torch.device("cpu")
    compute_tier = MemoryTier.HOST

    def __init__(self, arena: HostArena) -> None:
        self._arena = arena

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] from the arena."""
        return self._arena.allocate(nbytes, purpose)

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Give the buffer back to the arena."""
        self._arena.free(buffer)

    def upload(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Never called: host memory is compute memory."""
        raise AssertionError("the CPU has no device memory to copy to")

    def download(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Never called: host memory is compute memory."""
        raise AssertionError("the CPU has no device memory to copy from")

    def synchronize(self) -> None:
        """Return at once: compute on the CPU is synchronous."""


class SimulatedTransfers:
    """Host memory that plays a device: a budget and buffers of its own, asynchronous copies by the worker pool.

    Args:
        ledger: charged for device memory.
        pool: runs the copies.
    """

    device = torch.device("cpu")
    compute_tier = MemoryTier.DEVICE

    def __init__(self, ledger: TierLedger, pool: WorkerPool) -> None:
        self._ledger = ledger
        self._pool = pool

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] charged to the device."""
        nbytes = round_up(max(nbytes, 1), IO_ALIGNMENT_NBYTES)
        self._ledger.charge(MemoryTier.DEVICE, purpose, nbytes)
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Credit the device."""
        self._ledger.credit(MemoryTier.DEVICE, purpose, buffer.numel())

    def upload(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Start a copy in the worker pool."""
        return _PoolMove(self._pool.submit_copy(dst, src))

    def download(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Start a copy in the worker pool."""
        return _PoolMove(self._pool.submit_copy(dst, src))

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


class CudaTransfers:
    """A CUDA device: uploads and downloads run on streams of their own behind events.

    Compute is whatever stream is current when a method is called; both directions start after what that
    stream has been given so far, so a buffer may be refilled as soon as its last user has been *submitted*.

    Args:
        device: the CUDA device.
        ledger: charged for device memory.
    """

    compute_tier = MemoryTier.DEVICE

    def __init__(self, device: torch.device, ledger: TierLedger) -> None:
        self.device = device
        self._ledger = ledger
        self._upload_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._download_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Return uint8 [nbytes rounded up to a page] from torch's caching allocator."""
        nbytes = round_up(max(nbytes, 1), IO_ALIGNMENT_NBYTES)
        self._ledger.charge(MemoryTier.DEVICE, purpose, nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free(self, buffer: torch.Tensor, purpose: str) -> None:
        """Let the caching allocator reuse the memory once the copy streams are done with it."""
        buffer.record_stream(self._upload_stream)
        buffer.record_stream(self._download_stream)
        self._ledger.credit(MemoryTier.DEVICE, purpose, buffer.numel())

    def upload(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Start a copy on the upload stream."""
        return self._copy(self._upload_stream, dst, src)

    def download(self, dst: torch.Tensor, src: torch.Tensor) -> Move:
        """Start a copy on the download stream."""
        return self._copy(self._download_stream, dst, src)

    def _copy(self, stream: torch.cuda.Stream, dst: torch.Tensor, src: torch.Tensor) -> Move:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), torch.no_grad():
            dst.copy_(src, non_blocking=True)
            event = stream.record_event()
        return _CudaMove(event, self.device)

    def synchronize(self) -> None:
        """Block until the device is idle."""
        torch.cuda.synchronize(self.device)


class _CudaMove:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait_on_host(self) -> None:
        self._event.synchronize()

    def wait_on_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)
