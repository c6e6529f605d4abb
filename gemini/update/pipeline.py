"""The optimizer's pass over chunks, tile by tile: one is read while another is updated and a third is written.

State is updated where it lives: on the device by its kernel, in host memory by the worker pool, from disk
through a ring of host buffers. Which chunk comes next, and in which thread all this runs, is gemini.update.worker's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from gemini.errors import GeminiError
from gemini.kernels.adam_tile import AdamSegment, AdamSource, AdamTile, clip_segments
from gemini.kernels.device import DeviceKernels
from gemini.kernels.device_tile import DeviceChunk
from gemini.kernels.pool import Ticket
from gemini.offload.home import TiledHome
from gemini.offload.io import IoTicket
from gemini.offload.resources import Resources
from gemini.offload.transfer import Move
from gemini.tiers import MemoryTier, TileGrid
from gemini.update.job import NoProgressLog, ProgressLog, UpdateJob
from gemini.update.state_record import record_offsets, record_views

__all__ = ["TilePipeline", "tiles_of", "update_on_device"]

MAX_TILES_COMPUTING = 8
"""Tiles given to the worker pool at once; enough that no worker waits, few enough to bound the queue."""


def tiles_of(segments: Sequence[AdamSegment], tile_numel: int) -> tuple[int, ...]:
    """Return the tiles that sorted segments touch, in order."""
    touched: dict[int, None] = {}
    for segment in segments:
        touched.update(dict.fromkeys(range(segment.begin // tile_numel, -(-segment.end // tile_numel))))
    return tuple(touched)


@dataclass
class _Tile:
    """One tile on its way through the pipeline."""

    job: UpdateJob
    index: int
    length: int
    segments: tuple[AdamSegment, ...]
    weights: torch.Tensor
    """Working weights, uint8, padding included."""
    weights_before: torch.Tensor | None
    """The same before the update, where that is another place."""
    record: torch.Tensor
    record_before: torch.Tensor | None
    grad_bytes: torch.Tensor
    """Gradients, uint8; may be padded."""
    ring: int | None
    """Number of the ring buffer that holds what is on disk of the tile."""
    reads_grad_slot: bool = False
    """Whether gradients are read from where they were put together, on their way to disk."""
    reads: list[IoTicket] = field(default_factory=list)
    adam: Ticket | None = None
    leaving: list[IoTicket | Ticket | Move] = field(default_factory=list)

    @property
    def working(self) -> torch.Tensor:
        """Working weights, [length] of the chunk's dtype."""
        dtype = self.job.spec.dtype
        return self.weights[: self.length * dtype.itemsize].view(dtype)

    @property
    def grad(self) -> torch.Tensor:
        """Gradients, [length] of the dtype in which they wait."""
        dtype = self.job.grad_dtype
        return self.grad_bytes[: self.length * dtype.itemsize].view(dtype)

    @property
    def needs(self) -> list[IoTicket | Ticket]:
        """What must be complete before the tile can be updated."""
        return [*self.reads, *self.job.arrivals]

    def on_host(self) -> AdamTile:
        """Return what the native kernel is given."""
        master, momentum, variance = record_views(self.record, self.length, self.job.spec.dtype)
        return AdamTile(
            working=self.working,
            master=master,
            momentum=momentum,
            variance=variance,
            grad=self.grad,
            grad_scale=self.job.grad_scale,
            segments=self.segments,
            source=self._source(),
        )

    def _source(self) -> AdamSource | None:
        """Say where the parts are that are updated from one place to another."""
        if self.weights_before is None and self.record_before is None:
            return None
        dtype = self.job.spec.dtype
        weights, record = self.weights_before, self.record_before
        working = None if weights is None else weights[: self.length * dtype.itemsize].view(dtype)
        master, momentum, variance = (None,) * 3 if record is None else record_views(record, self.length, dtype)
        return AdamSource(working=working, master=master, momentum=momentum, variance=variance)

    def has_left(self) -> bool:
        return all(way.is_done() for way in self.leaving)

    def wait_until_left(self) -> None:
        for way in self.leaving:
            if isinstance(way, (IoTicket, Ticket)):
                way.wait()
            else:
                way.wait_on_host()


class TilePipeline:
    """Moves tiles through their stages; driven by one thread at a time.

    Args:
        resources: memory, disk, threads and copy engine; not closed here.
        tile_numel: elements in a tile.
        ring_depth: buffers in the ring.
        ring_nbytes: bytes of a buffer; 0 if nothing that is updated lives on disk.
        log: told how far each tile is; says where the ring lies.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        tile_numel: int,
        ring_depth: int,
        ring_nbytes: int,
        log: ProgressLog | None = None,
    ) -> None:
        self.tile_numel = tile_numel
        self._resources = resources
        self._log = NoProgressLog() if log is None else log
        source = self._log.memory
        num_buffers = ring_depth if ring_nbytes else 0
        self._ring = [resources.arena.allocate(ring_nbytes, "update ring", source=source) for _ in range(num_buffers)]
        self._free = list(range(num_buffers))
        self._reading: deque[_Tile] = deque()
        self._computing: deque[_Tile] = deque()
        self._leaving: deque[_Tile] = deque()
        self._updated: list[UpdateJob] = []

    @property
    def is_busy(self) -> bool:
        """Whether any tile is under way."""
        return bool(self._reading or self._computing or self._leaving)

    def start(self, job: UpdateJob, index: int) -> None:
        """Start a tile; waits for a ring buffer if it needs one and none is free.

        Args:
            job: what is updated.
            index: one of its tiles.

        Raises:
            OffloadIOError: a read or write failed.
        """
        homes = (job.state, job.working, job.grad)
        is_on_disk = any(home.tiers[index] is MemoryTier.NVME for home in homes)
        self._reading.append(self._start(job, index, self._claim_buffer() if is_on_disk else None))
        self._advance()
        while len(self._computing) > MAX_TILES_COMPUTING:
            self._send_off()

    def resume(self, job: UpdateJob, index: int, ring: int, *, is_updated: bool) -> None:
        """Go on with a tile that another process has left in a ring buffer.

        Args:
            job: what is updated.
            index: one of its tiles.
            ring: the buffer's number; it is free.
            is_updated: whether nothing is left to do but to write it.

        Raises:
            OffloadIOError: a read or write failed.
        """
        self._free.remove(ring)
        if is_updated:
            self._computing.append(self._tile(job, index, ring))
        else:
            self._reading.append(self._start(job, index, ring, is_resumed=True))

    def parts(self, job: UpdateJob, index: int, ring: int | None) -> list[torch.Tensor]:
        """Return where a tile's working weights, master (if it has one), momentum and variance are during its update.

        Args:
            job: what is updated.
            index: one of its tiles.
            ring: the buffer with what is on disk of it; None: nothing is.

        Returns:
            1D, one element for each of the tile's.
        """
        length = TileGrid(job.spec.numel, self.tile_numel).length_of(index)
        record, weights = self._memory_of((job.state, job.working), index, ring)
        working = weights[: length * job.spec.dtype.itemsize].view(job.spec.dtype)
        parts = (working, *record_views(record, length, job.spec.dtype))
        return [part for part in parts if part is not None]

    def push(self) -> None:
        """Wait until the oldest tile has gone one stage further; what computes goes first, then what is read."""
        self._advance()
        if self._computing:
            self._send_off()
        elif self._reading:
            self._compute()
        elif self._leaving:
            self._retire()

    def take_updated(self) -> list[UpdateJob]:
        """Return the job of each tile whose update the host has seen since the last call; writes may be under way."""
        updated, self._updated = self._updated, []
        return updated

    def close(self) -> None:
        """Give the ring back, once nothing is under way any more."""
        self.abandon()
        for buffer in self._ring:
            self._resources.arena.free(buffer)
        self._ring, self._free = [], []

    # ---------------------------------------------------------------- stages

    def _start(self, job: UpdateJob, index: int, ring: int | None, *, is_resumed: bool = False) -> _Tile:
        """Start reading what is on disk of a tile; of one that is resumed the ring holds all but the gradients."""
        tile = self._tile(job, index, ring)
        try:
            for home, part in ((job.state, tile.record), (job.working, tile.weights), (job.grad, tile.grad_bytes)):
                is_here = tile.reads_grad_slot if home is job.grad else is_resumed
                if home.tiers[index] is MemoryTier.NVME and not is_here:
                    tile.reads.append(home.read_tile(index, part))
        except GeminiError:
            for read in tile.reads:
                _wait_quietly(read)
            if ring is not None:
                self._free.append(ring)
            raise
        return tile

    def _tile(self, job: UpdateJob, index: int, ring: int | None) -> _Tile:
        """Say where the parts of a tile are while it is updated."""
        begin, end = TileGrid(job.spec.numel, self.tile_numel).range_of(index)
        length = end - begin
        grad_slot = job.grad_slot
        ahead = job.goes_ahead(index)
        homes = (job.state, job.working) if grad_slot is not None else (job.state, job.working, job.grad)
        record, weights, *grads = self._memory_of(homes, index, ring, ahead=ahead)
        if grad_slot is not None:
            grads = [grad_slot[begin * job.grad_dtype.itemsize :][: length * job.grad_dtype.itemsize]]
        weights_before, record_before = (
            home.tile(index) if ahead and home.tiers[index] is MemoryTier.HOST else None
            for home in (job.working, job.state)
        )
        return _Tile(
            job=job,
            index=index,
            length=length,
            segments=clip_segments(job.segments, begin, begin + length),
            weights=weights,
            weights_before=weights_before,
            record=record,
            record_before=record_before,
            grad_bytes=grads[0],
            reads_grad_slot=grad_slot is not None,
            ring=ring,
        )

    def _memory_of(
        self, homes: Sequence[TiledHome], index: int, ring: int | None, *, ahead: bool = False
    ) -> list[torch.Tensor]:
        """Return where a tile of some homes is updated: in its place or, one after another, in a ring buffer.

        With `ahead` the place of state and working weights is the spare one.
        """
        parts = []
        begin = 0
        for home in homes:
            if home.tiers[index] is MemoryTier.NVME:
                assert ring is not None
                parts.append(self._ring[ring][begin : begin + home.tile_nbytes[index]])
                begin += home.tile_nbytes[index]
            else:
                parts.append(home.tile(index, ahead=ahead and home.has_spare(index)))
        return parts

    def _claim_buffer(self) -> int:
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
        while self._reading and all(ticket.is_done() for ticket in self._reading[0].needs):
            self._compute()
        while self._computing and self._is_computed(self._computing[0]):
            self._send_off()
        while self._leaving and self._leaving[0].has_left():
            self._retire()

    def _is_computed(self, tile: _Tile) -> bool:
        return tile.adam is None or tile.adam.is_done()

    # A tile leaves its queue only when nothing can fail any more, so that `_abandon` finds its buffer.

    def _compute(self) -> None:
        tile = self._reading[0]
        for ticket in tile.needs:
            ticket.wait()
        journal = self._log.begin(tile.job, tile.index, tile.ring)
        tile.adam = self._resources.pool.submit_adam(tile.on_host(), journal=journal, record=tile.job.spec.name)
        self._computing.append(self._reading.popleft())

    def _send_off(self) -> None:
        tile = self._computing[0]
        if tile.adam is not None:
            tile.adam.wait()
        job, index = tile.job, tile.index
        self._log.end(job, index, tile.ring)
        ahead = job.goes_ahead(index)
        if job.state.tiers[index] is MemoryTier.NVME:
            tile.leaving.append(job.state.write_tile(index, tile.record, ahead=ahead))
        if job.working.tiers[index] is MemoryTier.NVME:
            tile.leaving.append(job.working.write_tile(index, tile.weights, ahead=ahead))
        if job.refreshes is not None:
            copy = self._refresh(job.refreshes, tile)
            tile.leaving.append(copy)
            job.refreshing.append(copy)
        self._updated.append(job)
        self._leaving.append(self._computing.popleft())

    def _refresh(self, weights: torch.Tensor, tile: _Tile) -> Ticket | Move:
        begin = tile.index * self.tile_numel
        copy = weights[begin : begin + tile.length]
        record = f"weights of {tile.job.spec.name}"
        if self._resources.transfers.compute_tier is MemoryTier.DEVICE:
            return self._resources.transfers.upload(copy, tile.working, after=tile.job.readers, record=record)
        return self._resources.pool.submit_copy(copy, tile.working, record=record)

    def _retire(self) -> None:
        tile = self._leaving[0]
        tile.wait_until_left()
        self._log.note_written(tile.job, tile.index, tile.ring)
        self._leaving.popleft()
        if tile.ring is not None:
            self._free.append(tile.ring)

    def abandon(self) -> None:
        """Wait for everything under way, whatever becomes of it, so that the buffers are free again."""
        for tile in (*self._reading, *self._computing, *self._leaving):
            for ticket in (*tile.reads, tile.adam, *tile.leaving):
                _wait_quietly(ticket)
            if tile.ring is not None:
                self._free.append(tile.ring)
        for queue in (self._reading, self._computing, self._leaving):
            queue.clear()


def update_on_device(job: UpdateJob, tile_numel: int, kernels: DeviceKernels) -> None:
    """Submit the update of a chunk whose state lives on the device; it runs in stream order.

    Args:
        job: the update; all tiles of the chunk live on the device.
        tile_numel: elements in a tile.
        kernels: the device's.
    """
    grid = TileGrid(job.spec.numel, tile_numel)
    kernels.adam_update(
        DeviceChunk(
            working=_first_elements(job.working, grid.numel, job.spec.dtype),
            records=_all_bytes(job.state),
            grad=_first_elements(job.grad, grid.numel, job.grad_dtype),
            tile_numel=tile_numel,
            offsets=record_offsets(tile_numel, job.spec.dtype),
            last_offsets=record_offsets(grid.length_of(grid.num_tiles - 1), job.spec.dtype),
            grad_scale=job.grad_scale,
            segments=job.segments,
        )
    )


def _all_bytes(home: TiledHome) -> torch.Tensor:
    assert home.device_buffer is not None
    return home.device_buffer


def _first_elements(home: TiledHome, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what a home on the device holds, without the padding behind its last tile."""
    return _all_bytes(home)[: numel * dtype.itemsize].view(dtype)


def _wait_quietly(ticket: Ticket | IoTicket | Move | None) -> None:
    if ticket is None:
        return
    with suppress(GeminiError):
        if isinstance(ticket, (Ticket, IoTicket)):
            ticket.wait()
        else:
            ticket.wait_on_host()
