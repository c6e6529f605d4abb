"""Bring first weights into their homes, tile by tile; the float32 value a parameter has becomes its master, exactly."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gemini.chunk.layout import ChunkSpec
from gemini.kernels.cpu import Isa, cast, split_master
from gemini.offload.home import TiledHome
from gemini.offload.io import empty_aligned
from gemini.offload.transfer import Transfers
from gemini.tiers import MemoryTier
from gemini.update import record_views

__all__ = ["write_home"]

MAX_WRITES_IN_FLIGHT = 2
"""Tiles of a home on their way to disk while the next one is put together."""


def write_home(
    spec: ChunkSpec,
    sources: list[torch.Tensor],
    working: TiledHome,
    state: TiledHome | None,
    *,
    tile_numel: int,
    transfers: Transfers,
    isa: Isa,
) -> None:
    """Write a chunk's first weights, and zero moments, to their homes.

    Args:
        spec: the chunk.
        sources: the parameters' values on the CPU, in the order of the layout's slots; read only.
        working: home of the working weights.
        state: home of the optimizer state; None for frozen chunks.
        tile_numel: elements in a tile.
        transfers: reaches homes on the device.
        isa: instruction set of the kernels.
    """
    for tile in range(len(working.tiers)):
        begin = tile * tile_numel
        length = min(tile_numel, spec.numel - begin)
        weights = empty_aligned(working.tile_nbytes[tile], torch.uint8).zero_()
        typed = weights[: length * spec.dtype.itemsize].view(spec.dtype)
        if state is None:
            for part, into in _overlaps(spec, sources, begin, length):
                typed[into].copy_(part)
        else:
            record = empty_aligned(state.tile_nbytes[tile], torch.uint8).zero_()
            master = torch.zeros(length, dtype=torch.float32)
            for part, into in _overlaps(spec, sources, begin, length):
                master[into].copy_(part)
            residual, _, _ = record_views(record, length, spec.dtype)
            if residual is None:
                typed.copy_(master)
            elif residual.dtype is torch.int16:
                split_master(typed, residual, master, isa=isa)
            else:
                residual.copy_(master)
                cast(typed, master, isa=isa)
            _put_tile(state, tile, record, transfers)
        _put_tile(working, tile, weights, transfers)
    for home in (working, state):
        if home is not None:
            home.finish_writes()


def _overlaps(
    spec: ChunkSpec, sources: list[torch.Tensor], begin: int, length: int
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Yield the part of each parameter inside a tile, flat, and where in the tile it goes."""
    for slot, source in zip(spec.slots, sources, strict=True):
        low, high = max(slot.begin, begin), min(slot.end, begin + length)
        if low < high:
            flat = source.detach().reshape(-1)
            yield flat[low - slot.begin : high - slot.begin], slice(low - begin, high - begin)


def _put_tile(home: TiledHome, tile: int, content: torch.Tensor, transfers: Transfers) -> None:
    tier = home.tiers[tile]
    if tier is MemoryTier.NVME:
        home.write_tile(tile, content)
        while len(home.writes) > MAX_WRITES_IN_FLIGHT:
            home.writes.pop(0).wait()
    elif tier is MemoryTier.HOST:
        home.tile(tile).copy_(content)
    else:
        transfers.upload(home.tile(tile), content).wait_on_host()
