"""First weights on their way home: exact bytes, and no more than a few parameters in memory at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from small_resources import small_resources
from torch import nn

from gemini.assembly.homes import write_home
from gemini.chunk.layout import ChunkSpec, build_layout
from gemini.model.module_tree import describe_model
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.tiers import MemoryTier

TILE_NUMEL = 4096


def chunk_of(sizes: list[int]) -> ChunkSpec:
    """Return a chunk of one float32 parameter for each size, packed in order of name."""
    model = nn.Module()
    model.row = nn.ParameterList(torch.zeros(size) for size in sizes)
    layout = build_layout(describe_model(model, working_dtype=torch.float32))
    (chunk,) = layout.chunks
    return chunk


def write(spec: ChunkSpec, sources: Iterator[torch.Tensor], resources: Resources) -> torch.Tensor:
    """Write a chunk's weights to host memory and return them, float32 [spec.numel]."""
    num_tiles = -(-spec.numel // TILE_NUMEL)
    lengths = [min(TILE_NUMEL, spec.numel - tile * TILE_NUMEL) for tile in range(num_tiles)]
    working, state = (
        TiledHome(
            [MemoryTier.HOST] * num_tiles,
            [-(-length * 4 // 4096) * 4096 * count for length in lengths],
            arena=resources.arena,
            store=None,
            purpose=purpose,
        )
        for purpose, count in (("working", 1), ("state", 2))
    )
    write_home(spec, sources, working, state, tile_numel=TILE_NUMEL, transfers=resources.transfers, isa=resources.isa)
    assert working.host_buffer is not None
    assert state.host_buffer is not None
    assert not state.host_buffer.any()
    return working.host_buffer.view(torch.float32)[: spec.numel].clone()


def test_parameters_within_and_across_tiles_arrive_where_the_layout_says() -> None:
    spec = chunk_of([10_000, 64, 1, 7, 4096, 3000, 0, 5000])
    values = [torch.arange(place.spec.numel) + 100_000.0 * position for position, place in enumerate(spec.places)]
    with small_resources() as resources:
        written = write(spec, iter(values), resources)
    expected = torch.zeros(spec.numel)
    for place, value in zip(spec.places, values, strict=True):
        expected[place.begin : place.end] = value
    assert torch.equal(written, expected)


def test_a_parameter_is_gone_before_the_second_one_after_it_comes() -> None:
    spec = chunk_of([2 * TILE_NUMEL] * 6)
    made: list[weakref.ref[torch.Tensor]] = []
    num_alive = []

    def sources() -> Iterator[torch.Tensor]:
        for place in spec.places:
            num_alive.append(sum(ref() is not None for ref in made))
            value = torch.ones(place.spec.numel)
            made.append(weakref.ref(value.untyped_storage()))
            yield value
            del value

    with small_resources() as resources:
        write(spec, sources(), resources)
    assert len(num_alive) == 6
    assert max(num_alive) <= 1
