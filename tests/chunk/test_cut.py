"""How chunks are cut: every element belongs to one rank, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
from builders import make_chunk_spec
from hypothesis import given
from hypothesis import strategies as st

from gemini.chunk.cut import cut_spec, cut_values, piece_of
from gemini.chunk.layout import ChunkSpec
from zero.sharding import shard_of

worlds = st.integers(1, 17)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def specs(draw: st.DrawFn) -> ChunkSpec:
    lengths = draw(st.lists(st.sampled_from([0, 1, 63, 64, 1000, 5000]), max_size=8))
    return make_chunk_spec(lengths, draw(dtypes))


@given(numel=st.integers(0, 100_000), itemsize=st.sampled_from([1, 2, 4, 8]), world_size=worlds)
def test_shards_are_equal_whole_blocks_that_cover_the_chunk(numel, itemsize, world_size):
    shards = [shard_of(numel, itemsize, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [shard.begin for shard in shards] == [rank * shards[0].numel for rank in range(world_size)]
    assert shards[-1].end == shards[0].whole_numel >= numel
    assert shards[0].numel * itemsize % 4096 == 0
    assert (shards[0].numel - 4096 // itemsize) * world_size < max(numel, 1)  # no block more than is needed


@pytest.mark.parametrize(
    ("numel", "world_size", "shard_numel"),
    [(10_000, 1, 10_240), (10_000, 2, 5120), (10_000, 3, 4096), (64, 4, 1024), (0, 2, 1024), (12_288, 3, 4096)],
)
def test_shard_lengths_in_float32(numel, world_size, shard_numel):
    assert shard_of(numel, 4, rank=0, world_size=world_size).numel == shard_numel


@given(spec=specs(), world_size=worlds)
def test_pieces_of_all_ranks_make_up_each_parameter(spec, world_size):
    shards = [shard_of(spec.numel, spec.dtype.itemsize, rank=rank, world_size=world_size) for rank in range(world_size)]
    for place in spec.places:
        pieces = [piece_of(place, shard) for shard in shards]
        assert [i for piece in pieces for i in range(place.spec.numel)[piece]] == list(range(place.spec.numel))


@given(spec=specs(), world_size=worlds)
def test_cut_layouts_hold_the_bytes_of_the_whole_chunk(spec, world_size):
    values = [torch.arange(place.begin, place.end, dtype=torch.float32) for place in spec.places]
    for rank in range(world_size):
        shard = shard_of(spec.numel, spec.dtype.itemsize, rank=rank, world_size=world_size)
        cut = cut_spec(spec, shard)
        names = {place.spec.name for place in cut.places}
        held = [value for place, value in zip(spec.places, values, strict=True) if place.spec.name in names]
        assert cut.numel == shard.numel
        for place, piece in zip(cut.places, cut_values(spec, shard, held), strict=True):
            assert piece.tolist() == list(range(shard.begin + place.begin, shard.begin + place.end))
