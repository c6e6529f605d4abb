"""The seam's identity: one process is a group of one."""

from __future__ import annotations

import pytest
import torch

from zero import ChunkCollectives, ScalarReduction, SingleProcess


@pytest.fixture
def group() -> ChunkCollectives:
    return SingleProcess()


def test_a_single_process_is_rank_zero_of_one(group: ChunkCollectives) -> None:
    assert (group.rank, group.world_size) == (0, 1)


def test_gathering_the_only_shard_copies_its_bits(group: ChunkCollectives) -> None:
    shard = torch.tensor([1.0, -0.0, float("nan"), 3.5], dtype=torch.bfloat16)
    out = torch.zeros(4, dtype=torch.bfloat16)
    group.all_gather_chunk(shard, out)
    assert torch.equal(out.view(torch.int16), shard.view(torch.int16))


def test_gathering_a_shard_that_lies_in_the_chunk_changes_nothing(group: ChunkCollectives) -> None:
    chunk = torch.arange(8.0)
    group.all_gather_chunk(chunk, chunk)
    assert chunk.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_reducing_the_only_gradient_copies_it(group: ChunkCollectives) -> None:
    out_shard = torch.zeros(3)
    group.reduce_scatter_chunk(torch.tensor([1.0, 2.0, 3.0]), out_shard)
    assert out_shard.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("reduction", list(ScalarReduction))
def test_reducing_one_number_returns_it(group: ChunkCollectives, reduction: ScalarReduction) -> None:
    assert group.all_reduce_scalar(2.5, reduction=reduction) == 2.5
    group.barrier()


def test_buffers_that_do_not_fit_are_refused(group: ChunkCollectives) -> None:
    with pytest.raises(ValueError, match="reduce_scatter_chunk with 1 rank: expected source and target"):
        group.reduce_scatter_chunk(torch.zeros(4), torch.zeros(2))
    with pytest.raises(ValueError, match="all_gather_chunk with 1 rank"):
        group.all_gather_chunk(torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16))
