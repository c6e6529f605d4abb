"""The optimizer's pass over all chunks: read, update, write, all at once, tile by tile.

State is updated where it lives: on the device by its kernel, in host memory by the worker pool, from disk
through a ring of host buffers in which one tile is read while another is updated and a third is written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from gemini.chunk.chunk import Chunk
from gemini.errors import GeminiError
from gemini.kernels.adam_tile import AdamSegment, AdamTile, state_format_of
from gemini.kernels.device import DeviceKernels, DeviceTile
from gemini.kernels.pool import Ticket
from gemini.offload.home import TiledHome
from gemini.offload.io import IoTicket
from gemini.offload.resources import Resources
from gemini.offload.transfer import Move
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["UpdateJob", "UpdatePipeline", "clip_segments", "record_views"]

MAX_TILES_COMPUTING = 8
"""Tiles given to the worker pool at once; enough that no worker waits, few enough to bound the queue."""


def record_views(
    record: torch.Tensor, length: int, working_dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Cut a state record into its parts.

    Args:
        record: uint8, one tile's record: master, momentum, variance, each padded for direct I/O.
        length: elements in the tile.
        working_dtype: dtype of the working weights, which decides the master's.

    Returns:
        master ([length] int16 or float32, None where the working weight is the master), momentum and variance
        (float32 [length]).
    """
    parts: list[torch.Tensor | None] = []
    begin = 0
    for dtype in (state_format_of(working_dtype).master_dtype, torch.float32, torch.float32):
        nbytes = length * dtype.itemsize if dtype is not None else 0
        parts.append(record[begin : begin + nbytes].view(dtype) if dtype is not None else None)
        begin += round_up(nbytes, IO_ALIGNMENT_NBYTES)
    master, momentum, variance = parts
    assert momentum is not None
    assert variance is not None
    return master, momentum, variance


def clip_segments(segments: Sequence[AdamSegment], begin: int, end: int) -> tuple[AdamSegment, ...]:
    """Return the parts of sorted segments inside [begin, end), relative to `begin`."""
    return tuple(
        AdamSegment(
            begin=max(segment.begin, begin) - begin,
            end=min(segment.end, end) - begin,
            hyper=segment.hyper,
            step=segment.step,
        )
        for segment in segments
        if segment.begin < end and segment.end > begin
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateJob:
    """One chunk's update."""

    chunk: Chunk
    state: TiledHome
    grad: TiledHome
    grad_dtype: torch.dtype
    segments: tuple[AdamSegment, ...]
    """Runs of elements to update, in chunk coordinates, sorted; the rest is left alone."""
    grad_scale: float


@dataclass
class _Tile:
    """One tile on its way through the pipeline."""

    job: UpdateJob
    index: int
    length: int
    segments: tuple[AdamSegment, ...]
    weights: torch.Tensor
    """Working weights, uint8, padding included."""
    record: torch.Tensor
    grad: torch.Tensor
    ring_buffer: torch.Tensor | None
    reads: list[IoTicket] = field(default_factory=list)
    adam: Ticket | None = None
    leaving: list[IoTicket | Move] = field(default_factory=list)

    @property
    def working(self) -> torch.Tensor:
        """Working weights, [length] of the chunk's dtype."""
        dtype = self.job.chunk.spec.dtype
        return self.weights[: self.length * dtype.itemsize].view(dtype)

    def has_left(self) -> bool:
        return all(way.is_done() for way in self.leaving)

    def wait_until_left(self) -> None:
        for way in self.leaving:
            if isinstance(way, IoTicket):
                way.wait()
            else:
                way.wait_on_host()


class UpdatePipeline:
    """Runs updates; one per engine.

    Args:
        resources: memory, disk, threads and copy engine; not closed here.
        tile_numel: elements in a tile.
        ring_depth: buffers in the ring.
        ring_nbytes: bytes of a buffer; 0 if nothing that is updated lives on disk.
        device_kernels: update tiles whose state lives on the device.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        tile_numel: int,
        ring_depth: int,
        ring_nbytes: int,
        device_kernels: DeviceKernels,
    ) -> None:
        self.stall_s = 0.0
        """Seconds spent waiting for the disk."""
        self._resources = resources
        self._tile_numel = tile_numel
        self._device_kernels = device_kernels
        self._free = [
            resources.arena.allocate(ring_nbytes, "update ring") for _ in range(ring_depth if ring_nbytes else 0)
        ]
        self._reading: deque[_Tile] = deque()
        self._computing: deque[_Tile] = deque()
        self._leaving: deque[_Tile] = deque()

    def run(self, jobs: Sequence[UpdateJob]) -> None:
        """Update every chunk; on return the host sees all results and only writes to disk are still under way.

        Args:
            jobs: the chunks, most urgent first; each is in the state UPDATING.

        Raises:
            OffloadIOError: a read or write failed; some tiles have been updated and some have not.
        """
        try:
            for job in jobs:
                if MemoryTier.DEVICE in job.state.tiers:
                    self._update_on_device(job)
            for tile in self._tiles(jobs):
                self._reading.append(tile)
                self._advance()
                while len(self._computing) > MAX_TILES_COMPUTING:
                    self._send_off()
            while self._reading:
                self._compute()
            while self._computing:
                self._send_off()
        except BaseException:
            self._abandon()
            raise
        for tile in self._leaving:
            for way in tile.leaving:
                if not isinstance(way, IoTicket):
                    way.wait_on_compute()

    def drain(self) -> None:
        """Block until everything written has reached the disk."""
        while self._leaving:
            self._retire()

    def close(self) -> None:
        """Give the ring back; whatever is under way is waited for by the disk store."""
        self._abandon()
        for buffer in self._free:
            self._resources.arena.free(buffer)
        self._free = []

    # ---------------------------------------------------------------- stages

    def _tiles(self, jobs: Sequence[UpdateJob]) -> Iterator[_Tile]:
        """Start reading tile after tile, as ring buffers come free."""
        for job in jobs:
            if MemoryTier.DEVICE in job.state.tiers:
                continue
            for index in range(len(job.state.tiers)):
                begin = index * self._tile_numel
                length = min(self._tile_numel, job.chunk.spec.numel - begin)
                segments = clip_segments(job.segments, begin, begin + length)
                if segments:
                    yield self._start(job, index, length, segments)

    def _start(self, job: UpdateJob, index: int, length: int, segments: tuple[AdamSegment, ...]) -> _Tile:
        homes = (job.state, job.chunk.home, job.grad)
        is_on_disk = any(home.tiers[index] is MemoryTier.NVME for home in homes)
        ring_buffer = self._claim_buffer() if is_on_disk else None
        reads: list[IoTicket] = []
        parts = []
        begin = 0
        for home in homes:
            if home.tiers[index] is MemoryTier.NVME:
                assert ring_buffer is not None
                part = ring_buffer[begin : begin + home.tile_nbytes[index]]
                begin += home.tile_nbytes[index]
                try:
                    reads.append(home.read_tile(index, part))
                except GeminiError:
                    for read in reads:
                        _wait_quietly(read)
                    self._free.append(ring_buffer)
                    raise
            else:
                part = home.tile(index)
            parts.append(part)
        record, weights, grad = parts
        return _Tile(
            job=job,
            index=index,
            length=length,
            segments=segments,
            weights=weights,
            record=record,
            grad=grad[: length * job.grad_dtype.itemsize].view(job.grad_dtype),
            ring_buffer=ring_buffer,
            reads=reads,
        )

    def _claim_buffer(self) -> torch.Tensor:
        self._advance()
        while not self._free:
            if self._reading and not self._computing:
                self._compute()
            elif self._computing:
                self._send_off()
            else:
                self._retire()
            self._advance()
        return self._free.pop()

    def _advance(self) -> None:
        """Move on whatever can move on without waiting."""
        while self._reading and all(read.is_done() for read in self._reading[0].reads):
            self._compute()
        while self._computing and self._is_computed(self._computing[0]):
            self._send_off()
        while self._leaving and self._leaving[0].has_left():
            self._retire()

    def _is_computed(self, tile: _Tile) -> bool:
        assert tile.adam is not None
        return tile.adam.is_done()

    # A tile leaves its queue only when nothing can fail any more, so that `_abandon` finds its buffer.

    def _compute(self) -> None:
        tile = self._reading[0]
        start = time.perf_counter()
        for read in tile.reads:
            read.wait()
        self.stall_s += time.perf_counter() - start
        tile.adam = self._resources.pool.submit_adam(AdamTile(**_tile_fields(tile)))
        self._computing.append(self._reading.popleft())

    def _send_off(self) -> None:
        tile = self._computing[0]
        assert tile.adam is not None
        tile.adam.wait()
        job, index = tile.job, tile.index
        chunk = job.chunk
        if job.state.tiers[index] is MemoryTier.NVME:
            tile.leaving.append(job.state.write_tile(index, tile.record))
        if chunk.home.tiers[index] is MemoryTier.NVME:
            tile.leaving.append(chunk.home.write_tile(index, tile.weights))
        if chunk.slot is not None:
            self._refresh_copy(tile, chunk)
        self._leaving.append(self._computing.popleft())

    def _refresh_copy(self, tile: _Tile, chunk: Chunk) -> None:
        """Bring a resident chunk's compute copy up to date."""
        assert chunk.compute is not None
        begin = tile.index * self._tile_numel
        copy = chunk.compute[begin : begin + tile.length]
        if self._resources.transfers.compute_tier is MemoryTier.DEVICE:
            tile.leaving.append(self._resources.transfers.upload(copy, tile.working))
        else:
            copy.copy_(tile.working)

    def _retire(self) -> None:
        start = time.perf_counter()
        tile = self._leaving[0]
        tile.wait_until_left()
        self.stall_s += time.perf_counter() - start
        self._leaving.popleft()
        if tile.ring_buffer is not None:
            self._free.append(tile.ring_buffer)

    def _abandon(self) -> None:
        """Wait for everything under way, whatever becomes of it, so that the buffers are free again."""
        for tile in (*self._reading, *self._computing, *self._leaving):
            for ticket in (*tile.reads, tile.adam, *tile.leaving):
                _wait_quietly(ticket)
            if tile.ring_buffer is not None:
                self._free.append(tile.ring_buffer)
        for queue in (self._reading, self._computing, self._leaving):
            queue.clear()

    def _update_on_device(self, job: UpdateJob) -> None:
        for index, tier in enumerate(job.state.tiers):
            assert tier is MemoryTier.DEVICE
            begin = index * self._tile_numel
            length = min(self._tile_numel, job.chunk.spec.numel - begin)
            segments = clip_segments(job.segments, begin, begin + length)
            if not segments:
                continue
            tile = _Tile(
                job=job,
                index=index,
                length=length,
                segments=segments,
                weights=job.chunk.home.tile(index),
                record=job.state.tile(index),
                grad=job.grad.tile(index)[: length * job.grad_dtype.itemsize].view(job.grad_dtype),
                ring_buffer=None,
            )
            self._device_kernels.adam_update(DeviceTile(**_tile_fields(tile)))


def _tile_fields(tile: _Tile) -> dict[str, Any]:
    """Return the arguments that AdamTile and DeviceTile have in common."""
    master, momentum, variance = record_views(tile.record, tile.length, tile.job.chunk.spec.dtype)
    return {
        "working": tile.working,
        "master": master,
        "momentum": momentum,
        "variance": variance,
        "grad": tile.grad,
        "grad_scale": tile.job.grad_scale,
        "segments": tile.segments,
    }


def _wait_quietly(ticket: Ticket | IoTicket | Move | None) -> None:
    if ticket is None:
        return
    with suppress(GeminiError):
        if isinstance(ticket, (Ticket, IoTicket)):
            ticket.wait()
        else:
            ticket.wait_on_host()
