"""Write initial weights to their homes, tile by tile; a parameter's float32 value becomes its master exactly.

Tiles in host memory are assembled where they live. One thread computes the values of parameters, so that random numbers
come in order. Many threads split them into working weights and the rest of masters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from functools import partial

import torch

from gemini.chunk.layout import ChunkSpec, ParamPlace
from gemini.kernels.cpu import Isa
from gemini.model.flat_values import FlatValues
from gemini.offload.home import TiledHome
from gemini.offload.io import empty_aligned
from gemini.offload.transfer import Transfers
from gemini.tiers import MemoryTier, TileGrid
from gemini.update.state_record import record_views, split_masters

__all__ = ["write_home"]

MAX_WRITES_IN_FLIGHT = 2
"""Tiles of a home on their way to disk while the next one is put together."""
PIECE_NUMEL = 1 << 18
"""Elements that a thread splits at a time: long beside the cost of handing them to it."""


def write_home(
    spec: ChunkSpec,
    sources: Iterable[FlatValues],
    working: TiledHome,
    state: TiledHome | None,
    *,
    tile_numel: int,
    transfers: Transfers,
    isa: Isa,
    threads: Executor,
) -> None:
    """Write a chunk's first weights, and zero moments, to their homes.

    Args:
        spec: the chunk.
        sources: the parameters' values, in the order of the layout's places. Each is taken when its first tile is put
            together and dropped after its last, so that a generator keeps few of them in memory; of each a tile's worth
            is asked for at a time.
        working: home of the working weights.
        state: home of the optimizer state; None for frozen chunks.
        tile_numel: elements in a tile.
        transfers: reaches homes on the device.
        isa: instruction set of the kernels.
        threads: share the work on each tile.
    """
    values = _Values(spec, sources)
    for tile in range(len(working.tiers)):
        begin, end = TileGrid(spec.numel, tile_numel).range_of(tile)
        length = end - begin
        weights = _blank_tile(working, tile)
        typed = weights[: length * spec.dtype.itemsize].view(spec.dtype)
        if state is None:
            for part, into in values.within(begin, begin + length):
                typed[into].copy_(part)
        else:
            record = _blank_tile(state, tile)
            masters = record_views(record, length, spec.dtype)[0]
            for part, into in values.within(begin, begin + length):
                rest = None if masters is None else masters[into]
                _store_masters(typed[into], rest, part, isa=isa, threads=threads)
            _put_tile(state, tile, record, transfers)
        _put_tile(working, tile, weights, transfers)
    for home in (working, state):
        if home is not None:
            home.finish_writes()


class _Values:
    """A chunk's parameters, looked at from its begin to its end.

    Args:
        spec: the chunk.
        sources: the parameters' values, in the order of the layout's places.
    """

    def __init__(self, spec: ChunkSpec, sources: Iterable[FlatValues]) -> None:
        self._coming = deque(spec.places)
        self._sources = iter(sources)
        self._held: deque[tuple[ParamPlace, FlatValues]] = deque()

    def within(self, begin: int, end: int) -> Iterator[tuple[torch.Tensor, slice]]:
        """Yield the part of each parameter in a range, flat, and where in the range it goes.

        Args:
            begin: first element, of the chunk; where the last range ended.
            end: element after the last.

        Yields:
            A parameter's values in the range, 1D, and their place in it.
        """
        while self._held and self._held[0][0].end <= begin:
            self._held.popleft()
        while self._coming and self._coming[0].begin < end:
            self._held.append((self._coming.popleft(), next(self._sources)))
        for place, flat in self._held:
            low, high = max(place.begin, begin), min(place.end, end)
            yield flat[low - place.begin : high - place.begin], slice(low - begin, high - begin)


def _blank_tile(home: TiledHome, tile: int) -> torch.Tensor:
    """Return zeros, uint8 [the tile's bytes]: the tile itself where it is in host memory, else a buffer for it."""
    if home.tiers[tile] is not MemoryTier.HOST:
        return empty_aligned(home.tile_nbytes[tile], torch.uint8).zero_()
    memory = home.tile(tile)
    return memory if home.is_private else memory.zero_()


def _store_masters(
    working: torch.Tensor, rest: torch.Tensor | None, values: torch.Tensor, *, isa: Isa, threads: Executor
) -> None:
    """Split values of any dtype, [n], into working weights and the rest of masters; see split_masters."""
    if rest is None:
        working.copy_(values)  # by torch's own threads
        return
    pieces = [torch.split(each, PIECE_NUMEL) for each in (working, rest, values.to(torch.float32).contiguous())]
    for _ in threads.map(partial(split_masters, isa=isa), *pieces):
        pass  # raises what a piece has raised


def _put_tile(home: TiledHome, tile: int, content: torch.Tensor, transfers: Transfers) -> None:
    """Send a tile that `_blank_tile` gave where it lives; it is there already if that is host memory."""
    tier = home.tiers[tile]
    if tier is MemoryTier.NVME:
        home.write_tile(tile, content)
        while len(home.writes) > MAX_WRITES_IN_FLIGHT:
            home.writes.pop(0)[1].wait()
    elif tier is MemoryTier.DEVICE:
        transfers.upload(home.tile(tile), content).wait_on_host()
