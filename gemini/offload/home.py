"""Where a chunk's bytes live between uses: a row of tiles, each in host memory, on disk or on the device.

Knows bytes and tiers; knows nothing of what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import torch

from gemini.errors import OffloadIOError, OutOfTierMemoryError
from gemini.offload.arena import HostArena
from gemini.offload.extents import Extent
from gemini.offload.io import IoTicket
from gemini.offload.store import DiskStore
from gemini.tiers import MemoryTier

__all__ = ["TileRun", "TiledHome"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRun:
    """Consecutive tiles of one tier, contiguous there."""

    tier: MemoryTier
    first_tile: int
    begin: int
    """First byte of the run in the whole row of tiles."""
    nbytes: int
    home_offset: int
    """First byte of the run in the tier's own buffer or extent."""


class TiledHome:
    """The home of one chunk's working weights, state or gradients.

    Args:
        tiers: tier of each tile.
        tile_nbytes: bytes of each tile, multiples of the I/O alignment.
        arena: source of host memory.
        store: the disk tier; may be None if no tile lives there.
        device_buffer: uint8 [sum of tile_nbytes] in device memory, if the tiles live there.
        purpose: the ledger's word for these bytes.
    """

    def __init__(
        self,
        tiers: Sequence[MemoryTier],
        tile_nbytes: Sequence[int],
        *,
        arena: HostArena,
        store: DiskStore | None,
        device_buffer: torch.Tensor | None = None,
        purpose: str,
    ) -> None:
        self.tiers = tuple(tiers)
        self.tile_nbytes = tuple(tile_nbytes)
        self._arena = arena
        self._store = store
        self._offsets = self._offsets_by_tier()
        host_nbytes = self.nbytes(MemoryTier.HOST)
        disk_nbytes = self.nbytes(MemoryTier.NVME)
        self.host_buffer: torch.Tensor | None = None
        self.device_buffer = device_buffer
        self._extent: Extent | None = None
        self.writes: list[IoTicket] = []
        if disk_nbytes:
            assert store is not None, "tiles on disk need a disk store"
            self._extent = store.allocate(disk_nbytes)
        if host_nbytes:
            try:
                self.host_buffer = arena.allocate(host_nbytes, purpose)
            except OutOfTierMemoryError:
                self.close()
                raise

    def _offsets_by_tier(self) -> list[int]:
        filled = dict.fromkeys(MemoryTier, 0)
        offsets = []
        for tier, nbytes in zip(self.tiers, self.tile_nbytes, strict=True):
            offsets.append(filled[tier])
            filled[tier] += nbytes
        return offsets

    def nbytes(self, tier: MemoryTier) -> int:
        """Return the bytes of the tiles in one tier."""
        return sum(n for t, n in zip(self.tiers, self.tile_nbytes, strict=True) if t is tier)

    @property
    def is_on_disk(self) -> bool:
        """Whether any tile lives on disk."""
        return self._extent is not None

    def runs(self) -> list[TileRun]:
        """Return the tiles as maximal runs of one tier, in order."""
        runs = []
        begin = tile = 0
        for tier, group in groupby(self.tiers):
            count = len(list(group))
            nbytes = sum(self.tile_nbytes[tile : tile + count])
            runs.append(
                TileRun(tier=tier, first_tile=tile, begin=begin, nbytes=nbytes, home_offset=self._offsets[tile])
            )
            tile += count
            begin += nbytes
        return runs

    def tile(self, tile: int) -> torch.Tensor:
        """Return a tile that lives in host or device memory, uint8 [its bytes]."""
        buffer = self.device_buffer if self.tiers[tile] is MemoryTier.DEVICE else self.host_buffer
        assert buffer is not None
        assert self.tiers[tile] is not MemoryTier.NVME
        return buffer[self._offsets[tile] : self._offsets[tile] + self.tile_nbytes[tile]]

    def read_tile(self, tile: int, into: torch.Tensor) -> IoTicket:
        """Start reading a tile from disk.

        Args:
            tile: its index; it lives on disk.
            into: uint8 [its bytes], page aligned.

        Returns:
            Ticket of the read.
        """
        return self._read(self._offsets[tile], into)

    def read_run(self, run: TileRun, into: torch.Tensor) -> IoTicket:
        """Start reading a run from disk into uint8 [run.nbytes]."""
        return self._read(run.home_offset, into)

    def _read(self, offset: int, into: torch.Tensor) -> IoTicket:
        assert self._store is not None
        assert self._extent is not None
        self.finish_writes()
        return self._store.read(self._extent, into, offset=offset)

    def write_tile(self, tile: int, source: torch.Tensor) -> IoTicket:
        """Start writing a tile to disk; later reads of this home wait for it.

        Args:
            tile: its index; it lives on disk.
            source: uint8 [its bytes], page aligned; untouched until the ticket completes.

        Returns:
            Ticket of the write.
        """
        return self._write(self._offsets[tile], source)

    def write_run(self, run: TileRun, source: torch.Tensor) -> IoTicket:
        """Start writing a run to disk from uint8 [run.nbytes]; as `write_tile`."""
        return self._write(run.home_offset, source)

    def _write(self, offset: int, source: torch.Tensor) -> IoTicket:
        assert self._store is not None
        assert self._extent is not None
        ticket = self._store.write(self._extent, source, offset=offset)
        self.writes.append(ticket)
        return ticket

    def is_being_written(self) -> bool:
        """Return whether a write has yet to reach the disk, so that a read would have to wait for it."""
        return any(not ticket.is_done() for ticket in self.writes)

    def finish_writes(self) -> None:
        """Block until everything written has reached the disk.

        Raises:
            OffloadIOError: a write failed.
        """
        while self.writes:
            self.writes[-1].wait()
            self.writes.pop()

    def close(self) -> None:
        """Give the host memory and the disk space back; a write that failed no longer matters."""
        if self.host_buffer is not None:
            self._arena.free(self.host_buffer)
            self.host_buffer = None
        if self._extent is not None and self._store is not None:
            for ticket in self.writes:
                with suppress(OffloadIOError):
                    ticket.wait()
            self.writes.clear()
            self._store.free(self._extent)
            self._extent = None
