"""First weights on their way home: exact bytes, and no more than a few parameters in memory at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_resources import resident_pages, small_resources
from torch import nn

from gemini import GeminiConfig, GeminiDDP
from gemini.assembly.homes import write_home
from gemini.chunk.layout import ChunkSpec, build_layout
from gemini.model.module_tree import describe_model
from gemini.offload.home import TiledHome
from gemini.offload.memory_file import SharedBuffer
from gemini.offload.resources import Resources
from gemini.placement.plan import state_record_nbytes
from gemini.tiers import MemoryTier
from gemini.update.state_record import join_masters, record_views

TILE_NUMEL = 4096
MASTER_ITEMSIZES = {torch.bfloat16: 2, torch.float16: 4, torch.float32: 0}
USED = torch.full((24_576,), 255, dtype=torch.uint8)


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
    with ThreadPoolExecutor(2) as threads:
        write_home(
            spec,
            sources,
            working,
            state,
            tile_numel=TILE_NUMEL,
            transfers=resources.transfers,
            isa=resources.isa,
            threads=threads,
        )
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tier", [MemoryTier.HOST, MemoryTier.DEVICE])
def test_many_threads_split_masters_as_one_does(dtype: torch.dtype, tier: MemoryTier) -> None:
    """A tile of several pieces, the last one short, of values in float64."""
    tile_numel = 1 << 20
    model = nn.Module()
    model.row = nn.ParameterList(torch.zeros(size) for size in (100_000, 900_001, 300_000))
    (spec,) = build_layout(describe_model(model, working_dtype=dtype)).chunks
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(place.spec.numel, generator=generator, dtype=torch.float64) for place in spec.places]
    masters = torch.zeros(spec.numel)
    for place, value in zip(spec.places, values, strict=True):
        masters[place.begin : place.end] = value
    lengths = [tile_numel, spec.numel - tile_numel]
    with small_resources(device="simulated") as resources, ThreadPoolExecutor(3) as threads:
        working, state = (
            TiledHome(
                [tier] * 2, nbytes, arena=resources.arena, store=None, transfers=resources.transfers, purpose=purpose
            )
            for purpose, nbytes in (
                ("working", [-(-length * dtype.itemsize // 4096) * 4096 for length in lengths]),
                ("state", [state_record_nbytes(length, MASTER_ITEMSIZES[dtype]) for length in lengths]),
            )
        )
        write_home(
            spec,
            iter(values),
            working,
            state,
            tile_numel=tile_numel,
            transfers=resources.transfers,
            isa=resources.isa,
            threads=threads,
        )
        for tile, length in enumerate(lengths):
            expected = masters[tile * tile_numel :][:length]
            with working.opened(tile, resources.transfers) as weights, state.opened(tile, resources.transfers) as rest:
                found = weights[: length * dtype.itemsize].view(dtype)
                joined = torch.empty(length)
                rest_of_masters, momentum, variance = record_views(rest, length, dtype)
                join_masters(joined, found, rest_of_masters)
                assert torch.equal(joined, expected)
                if dtype is not torch.bfloat16:  # whose split rounds ties away from zero
                    assert torch.equal(found, expected.to(dtype))
                assert not momentum.any()
                assert not variance.any()
        working.close()
        state.close()


def test_memory_that_was_somebody_elses_is_cleared() -> None:
    spec = chunk_of([5000])
    with small_resources() as resources:
        used = SharedBuffer(view=USED, writer=USED, mappings=(), offset=0)
        home = TiledHome(
            [MemoryTier.HOST] * 2,
            [16_384, 8192],
            arena=resources.arena,
            store=None,
            shared=used,
            purpose="state",
        )
        with ThreadPoolExecutor(1) as threads:
            write_home(
                spec,
                iter([torch.ones(5000)]),
                home,
                None,
                tile_numel=TILE_NUMEL,
                transfers=resources.transfers,
                isa=resources.isa,
                threads=threads,
            )
    assert torch.equal(USED.view(torch.float32)[:5000], torch.ones(5000))
    assert not USED[20_000:].any()


def test_an_engine_has_all_its_pages_before_the_first_step() -> None:
    """Else the first step would pay for them, and a machine without the memory would end the run there."""
    config = GeminiConfig(dtype=torch.bfloat16, device="cpu", host_budget="64MiB", num_threads=2)
    with GeminiDDP(nn.Linear(512, 512), config) as engine:
        runtime = engine.runtime
        homes = [*runtime.states.values(), *(chunk.home for chunk in runtime.core.chunks)]
        assert len(homes) >= 2
        for home in homes:
            assert home.host_buffer is not None
            assert resident_pages(home.host_buffer) == home.host_buffer.numel() // 4096
