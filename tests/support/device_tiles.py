"""Tiles and chunks to compare device kernels with the native ones: many magnitudes, segments that fit no block."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gemini.kernels.cpu import AdamHyper, AdamSegment, AdamTile
from gemini.kernels.device_tile import DeviceChunk, DeviceTile
from gemini.update.state_record import record_offsets

HYPERS = (
    AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, is_decoupled=True),
    AdamHyper(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.05, is_decoupled=False),
    AdamHyper(lr=2e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, is_decoupled=True),
)


def make_values(numel: int, generator: torch.Generator) -> Tensor:
    """Return float32 values over many magnitudes, with zeros, subnormals and values whose square overflows."""
    values = torch.randn(numel, generator=generator) * torch.exp(4 * torch.randn(numel, generator=generator))
    values[::11] = 0.0
    values[3::13] *= 1e-40
    values[5::101] = 3e30
    return values


def make_tile(working_dtype: torch.dtype, grad_dtype: torch.dtype, numel: int) -> AdamTile:
    generator = torch.Generator().manual_seed(numel)
    master = make_values(numel, generator)
    residual = None
    if working_dtype == torch.bfloat16:
        residual = torch.randint(-(1 << 15), 1 << 15, (numel,), generator=generator, dtype=torch.int16)
    elif working_dtype == torch.float16:
        residual = master.clone()
    return AdamTile(
        working=master.to(working_dtype),
        master=residual,
        momentum=make_values(numel, generator),
        variance=make_values(numel, generator).abs(),
        grad=make_values(numel, generator).clamp(-6e4, 6e4).to(grad_dtype),
        grad_scale=0.33325,
        segments=make_segments(numel),
    )


def make_segments(numel: int) -> tuple[AdamSegment, ...]:
    """Return segments that do not fit blocks, with gaps, neighbours and an empty one."""
    bounds = (
        (numel // 37, numel // 7),
        (numel // 7, numel // 6),
        (numel // 4, numel // 4),
        (numel // 2, numel - numel // 37),
    )
    return tuple(
        AdamSegment(begin=begin, end=end, hyper=HYPERS[index % 3], step=1 + 7 * index)
        for index, (begin, end) in enumerate(bounds)
    )


def copy_tile(tile: AdamTile, device: torch.device) -> DeviceTile:
    return DeviceTile(
        working=tile.working.to(device, copy=True),
        master=None if tile.master is None else tile.master.to(device, copy=True),
        momentum=tile.momentum.to(device, copy=True),
        variance=tile.variance.to(device, copy=True),
        grad=tile.grad.to(device, copy=True),
        grad_scale=tile.grad_scale,
        segments=tile.segments,
    )


def copy_chunk(tile: AdamTile, device: torch.device, tile_numel: int = 1 << 20) -> DeviceChunk:
    """Return the content of a tile as a chunk of shorter tiles on a device."""
    numel, dtype = tile.working.numel(), tile.working.dtype
    num_tiles = -(-numel // tile_numel)
    offsets = record_offsets(tile_numel, dtype)
    last_offsets = record_offsets(numel - (num_tiles - 1) * tile_numel if numel else 0, dtype)
    nbytes = max(num_tiles - 1, 0) * offsets.nbytes + last_offsets.nbytes * (numel > 0)
    chunk = DeviceChunk(
        working=tile.working.to(device, copy=True),
        records=torch.zeros(nbytes, dtype=torch.uint8, device=device),
        grad=tile.grad.to(device, copy=True),
        tile_numel=tile_numel,
        offsets=offsets,
        last_offsets=last_offsets,
        grad_scale=tile.grad_scale,
        segments=tile.segments,
    )
    for index, part in enumerate(_all_tiles(chunk)):
        here = slice(index * tile_numel, index * tile_numel + part.working.numel())
        part.momentum.copy_(tile.momentum[here])
        part.variance.copy_(tile.variance[here])
        if part.master is not None and tile.master is not None:
            part.master.copy_(tile.master[here])
    return chunk


def parts_of(chunk: DeviceChunk) -> dict[str, Tensor]:
    """Return working weights, master (if there is one), momentum and variance of a chunk, each in one piece."""
    tiles = _all_tiles(chunk)
    parts = {"working": chunk.working}
    for name in ("master", "momentum", "variance"):
        pieces = [piece for piece in (getattr(tile, name) for tile in tiles) if piece is not None]
        if pieces:
            parts[name] = torch.cat(pieces)
    return parts


def _all_tiles(chunk: DeviceChunk) -> list[DeviceTile]:
    everything = AdamSegment(begin=0, end=chunk.working.numel(), hyper=HYPERS[0], step=1)
    return list(dataclasses.replace(chunk, segments=(everything,)).tiles())


def assert_bits_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    actual = actual.cpu()
    assert actual.dtype == expected.dtype
    if expected.is_floating_point():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        actual, expected = actual.view(bits), expected.view(bits)
    different = (actual != expected).nonzero()
    assert len(different) == 0, f"{what}: {len(different)} of {len(expected)} differ, first at {different[0]}"
