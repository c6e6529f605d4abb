"""The place of a chunk's bytes between uses: a row of tiles, each in host memory, on disk or on the device.

A tile in host memory or on disk may have a second, spare place. A write *ahead* goes to the spare place, where readers
do not see it, until `flip` makes the spare place the tile's place and the old place the spare one.

Knows bytes and tiers, not what the bytes mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from gemini.errors import OffloadIOError, OutOfTierMemoryError
from gemini.kernels.pool import Ticket
from gemini.offload.arena import HostArena, MemorySource
from gemini.offload.extents import Extent
from gemini.offload.io import IoTicket, empty_aligned
from gemini.offload.memory_file import SharedBuffer
from gemini.offload.store import DiskStore
from gemini.offload.transfer import Transfers
from gemini.tiers import MemoryTier

__all__ = ["HomeReaders", "TileRun", "TiledHome"]


class HomeReaders(Protocol):
    """Processes that read a home's host memory themselves."""

    def wait(self) -> None:
        """Block until none reads what it has asked for so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRun:
    """Consecutive tiles in one tier, contiguous there."""

    tier: MemoryTier
    first_tile: int
    begin: int
    """First byte of the run in the whole row of tiles."""
    nbytes: int
    home_offset: int
    """First byte of the run in the tier's own buffer or extent."""
    is_spare: bool = False
    """Whether the run lies in the extent of the spare places."""

    @property
    def place(self) -> tuple[MemoryTier, bool]:
        """Tier of the run, and whether the run is in the extent of the spare places."""
        return self.tier, self.is_spare


class TiledHome:
    """The home of one chunk's working weights, state or gradients.

    Args:
        tiers: the tier of each tile.
        tile_nbytes: bytes of each tile, multiples of the I/O alignment.
        arena: the source of host memory.
        store: the disk tier; may be None if no tile is on disk.
        transfers: source of device memory; None if no tile is there.
        shared: the memory file's part, from the arena, that holds all tiles; None: the home has its own memory.
        source: provides the host memory; None: private memory of this process.
        readers: others who read that memory, awaited before it changes; None: nobody does.
        spare_tiles: tiles in host memory or on disk that have a spare place.
        purpose: the ledger's name for the purpose of these bytes.
        spare_purpose: the same for spare places in host memory.
        record: name of the content, for messages about the disk.
    """

    def __init__(
        self,
        tiers: Sequence[MemoryTier],
        tile_nbytes: Sequence[int],
        *,
        arena: HostArena,
        store: DiskStore | None,
        transfers: Transfers | None = None,
        shared: SharedBuffer | None = None,
        source: MemorySource | None = None,
        readers: HomeReaders | None = None,
        spare_tiles: Iterable[int] = (),
        purpose: str,
        spare_purpose: str = "spares",
        record: str = "",
    ) -> None:
        # - What it is
        self.tiers = tuple(tiers)
        self.tile_nbytes = tuple(tile_nbytes)
        # - What holds bytes
        self._arena = arena
        self._store = store
        self.host_buffer: torch.Tensor | None = None
        self._spare_buffer: torch.Tensor | None = None
        self._transfers = transfers
        self._purpose = purpose
        self.device_buffer: torch.Tensor | None = None
        """Memory of the tiles on the device, uint8; None if there are none."""
        self._shared = shared
        self._readers = readers
        self.is_private = shared is None and source is None
        """Whether host memory is this process's alone, and so was zero in the beginning."""
        self._extents: dict[bool, Extent] = {}  # key: whether it is the extent of the spare places
        # - Writes under way
        self.writes: list[tuple[TileRun, IoTicket]] = []
        """Writes that are not yet known to have reached the disk, oldest first."""
        self._writes_ahead: list[tuple[TileRun, IoTicket]] = []
        # - Places of tiles
        self._places = self._places_by_tier()
        self._spares: dict[int, TileRun] = {}  # spare place of each tile that has one
        spare_nbytes = {MemoryTier.HOST: 0, MemoryTier.NVME: 0}
        for tile in sorted(spare_tiles):
            own = self._places[tile]
            self._spares[tile] = dataclasses.replace(own, home_offset=spare_nbytes[own.tier], is_spare=True)
            spare_nbytes[own.tier] += own.nbytes
        host_nbytes, device_nbytes = self.nbytes(MemoryTier.HOST), self.nbytes(MemoryTier.DEVICE)
        try:
            for is_spare, nbytes in ((False, self.nbytes(MemoryTier.NVME)), (True, spare_nbytes[MemoryTier.NVME])):
                if nbytes:
                    assert store is not None, "tiles on disk need a disk store"
                    self._extents[is_spare] = store.allocate(nbytes, record=record)
            if shared is not None:
                assert shared.view.numel() == host_nbytes == sum(self.tile_nbytes)
                self.host_buffer = shared.view
            elif host_nbytes:
                self.host_buffer = arena.allocate(host_nbytes, purpose, source=source)
            if spare_nbytes[MemoryTier.HOST]:
                self._spare_buffer = arena.allocate(spare_nbytes[MemoryTier.HOST], spare_purpose)
            if device_nbytes:
                assert transfers is not None, "tiles on a device need its transfers"
                self.device_buffer = transfers.allocate(device_nbytes, purpose)
        except OutOfTierMemoryError:
            self.close()
            raise

    def _places_by_tier(self) -> list[TileRun]:
        """Return each tile's own place as a run of one tile."""
        filled = dict.fromkeys(MemoryTier, 0)
        places = []
        begin = 0
        for tile, (tier, nbytes) in enumerate(zip(self.tiers, self.tile_nbytes, strict=True)):
            places.append(TileRun(tier=tier, first_tile=tile, begin=begin, nbytes=nbytes, home_offset=filled[tier]))
            filled[tier] += nbytes
            begin += nbytes
        return places

    def nbytes(self, tier: MemoryTier) -> int:
        """Return the bytes of the tiles in one tier, without spare places."""
        return sum(n for t, n in zip(self.tiers, self.tile_nbytes, strict=True) if t is tier)

    @property
    def is_on_disk(self) -> bool:
        """Whether any tile is on disk."""
        return bool(self._extents)

    @property
    def is_pageable(self) -> bool:
        """Whether an accelerator's copies from and to the host memory block, because it is not page-locked."""
        buffers = [buffer for buffer in (self.host_buffer, self._spare_buffer) if buffer is not None]
        return any(self._arena.is_pageable(buffer) for buffer in buffers)

    @property
    def is_shared(self) -> bool:
        """Whether this is one copy for several ranks."""
        return self._shared is not None

    @property
    def is_writable(self) -> bool:
        """Whether this process may write to the home; only one process may write to a shared home."""
        return self._shared is None or self._shared.writer is not None

    def refresh(self) -> None:
        """Show the present content of a shared home, whatever this process has written to its parameters."""
        if self._shared is not None:
            self._shared.refresh()

    def await_readers(self) -> None:
        """Block until no other process reads the home, which is about to change."""
        if self._readers is not None:
            self._readers.wait()

    def populate(self) -> Ticket | None:
        """Start the first touch of the host memory, which must be private; it may be written to meanwhile.

        Returns:
            The job's ticket; None if there is nothing to do.
        """
        assert self.is_private
        return None if self.host_buffer is None else self._arena.populate(self.host_buffer)

    def has_spare(self, tile: int) -> bool:
        """Return whether a tile can be written ahead."""
        return tile in self._spares

    def runs(self) -> list[TileRun]:
        """Return the tiles as the longest runs that are contiguous in one tier, in order."""
        runs: list[TileRun] = []
        for place in self._places:
            last = runs[-1] if runs else None
            if last is not None and last.place == place.place and last.home_offset + last.nbytes == place.home_offset:
                runs[-1] = dataclasses.replace(last, nbytes=last.nbytes + place.nbytes)
            else:
                runs.append(place)
        return runs

    def tile(self, tile: int, *, ahead: bool = False) -> torch.Tensor:
        """Return a tile that is in host or device memory.

        Args:
            tile: the tile's index.
            ahead: return its spare place, which is not read before `flip`.

        Returns:
            uint8 [its bytes]; writable if the home is.
        """
        place = self._spares[tile] if ahead else self._places[tile]
        if self._shared is not None and self._shared.writer is not None:
            return self._shared.writer[place.home_offset : place.home_offset + place.nbytes]
        return self.memory_of(place)

    def memory_of(self, run: TileRun) -> torch.Tensor:
        """Return a run that is in host or device memory as readers see it, uint8 [its bytes]."""
        assert run.tier is not MemoryTier.NVME
        own = self.device_buffer if run.tier is MemoryTier.DEVICE else self.host_buffer
        buffer = self._spare_buffer if run.is_spare else own
        assert buffer is not None
        return buffer[run.home_offset : run.home_offset + run.nbytes]

    def read_tile(self, tile: int, into: torch.Tensor) -> IoTicket:
        """Start reading a tile from disk.

        Args:
            tile: index of a tile on disk.
            into: uint8 [its bytes], page aligned.

        Returns:
            The read's ticket.
        """
        return self.read_run(self._places[tile], into)

    def read_run(self, run: TileRun, into: torch.Tensor) -> IoTicket:
        """Start reading a run from disk into uint8 [run.nbytes]."""
        assert self._store is not None
        self.finish_writes()
        return self._store.read(self._extents[run.is_spare], into, offset=run.home_offset)

    def write_tile(self, tile: int, source: torch.Tensor, *, ahead: bool = False) -> IoTicket:
        """Start writing a tile to disk; later reads of this home wait for it.

        Args:
            tile: index of a tile on disk.
            source: uint8 [its bytes], page aligned; untouched until the ticket completes.
            ahead: write to the tile's spare place, which is not read before `flip`.

        Returns:
            The write's ticket.
        """
        if not ahead:
            return self.write_run(self._places[tile], source)
        ticket = self._write(self._spares[tile], source)
        self._writes_ahead.append((self._spares[tile], ticket))
        return ticket

    def write_run(self, run: TileRun, source: torch.Tensor) -> IoTicket:
        """Start writing a run to disk from uint8 [run.nbytes], as `write_tile` does.

        It replaces an earlier write of the same run that has ended, with or without an error.
        """
        ticket = self._write(run, source)
        self.writes = [each for each in self.writes if each[0] != run or not each[1].is_done()]
        self.writes.append((run, ticket))
        return ticket

    def _write(self, run: TileRun, source: torch.Tensor) -> IoTicket:
        assert self._store is not None
        return self._store.write(self._extents[run.is_spare], source, offset=run.home_offset)

    @contextmanager
    def opened(self, tile: int, transfers: Transfers, *, write: bool = False) -> Iterator[torch.Tensor]:
        """Open a tile in any tier; blocks until it is read, and with `write` until it is written back.

        Args:
            tile: the tile's index.
            transfers: gives access to device memory.
            write: whether changes reach the home when the context ends. After an exception they do not, except in host
                memory, where they are made in place.

        Yields:
            uint8 [its bytes] in host memory.

        Raises:
            OffloadIOError: the tile cannot be read or written.
        """
        tier = self.tiers[tile]
        if write:
            self.await_readers()
        if tier is MemoryTier.HOST:
            yield self.tile(tile)
            return
        buffer = empty_aligned(self.tile_nbytes[tile], torch.uint8)
        if tier is MemoryTier.NVME:
            self.read_tile(tile, buffer).wait()
        else:
            transfers.download(buffer, self.tile(tile)).wait_on_host()
        yield buffer
        if not write:
            return
        if tier is MemoryTier.NVME:
            self.write_tile(tile, buffer).wait()
            self.finish_writes()
        else:
            transfers.upload(self.tile(tile), buffer).wait_on_host()

    def flip(self, tiles: Iterable[int]) -> None:
        """Make the places that were written ahead the tiles' places; the old places become the spare ones."""
        for tile in tiles:
            self._places[tile], self._spares[tile] = self._spares[tile], self._places[tile]
        self.writes = [*self.writes, *self._writes_ahead]
        self._writes_ahead = []

    def forget_ahead(self) -> None:
        """Block until no write ahead is running; the spare places may then be written again."""
        for _, ticket in self._writes_ahead:
            with suppress(OffloadIOError):
                ticket.wait()
        self._writes_ahead = []

    def is_being_written(self) -> bool:
        """Return whether a write has not reached the disk yet, so that a read would have to wait for it."""
        return any(not ticket.is_done() for _, ticket in self.writes)

    def finish_writes(self) -> None:
        """Block until all writes have reached the disk, except writes ahead.

        Raises:
            OffloadIOError: a write failed.
        """
        for _, ticket in self.writes:
            ticket.wait()
        self.writes = []

    def close(self) -> None:
        """Free the host memory and the disk space; a failed write no longer matters."""
        if self.host_buffer is not None:
            self._arena.free(self.host_buffer)
            self.host_buffer = self._shared = None
        if self._spare_buffer is not None:
            self._arena.free(self._spare_buffer)
            self._spare_buffer = None
        if self.device_buffer is not None:
            assert self._transfers is not None
            self._transfers.free(self.device_buffer, self._purpose)
            self.device_buffer = None
        if self._extents and self._store is not None:
            for _, ticket in self.writes:
                with suppress(OffloadIOError):
                    ticket.wait()
            self.writes = []
            self.forget_ahead()
            for extent in self._extents.values():
                self._store.free(extent)
            self._extents = {}
