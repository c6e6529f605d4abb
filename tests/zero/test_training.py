"""Many ranks train as one process does on the same batches."""

from __future__ import annotations

import pytest
import torch
from comparison import FLOAT32_TOLERANCE, STAGES, agreed, alone, assert_trains_alike
from hypothesis import given
from hypothesis import strategies as st
from rank_cases import (
    count_collectives,
    count_gathers_of_words,
    overflow_on_last_rank,
    train_alone,
    train_in_pieces,
    train_sharded,
)
from rank_pool import RankPool
from training_harness import distance, same_bits

from gemini.gradients.exchange import copy_piece, mean_of_sum
from gemini.gradients.replica_sums import sum_of_parts


@pytest.mark.quick_cases(5)
@STAGES
@pytest.mark.parametrize(
    ("world_size", "place"),
    [(2, "host"), (2, "nvme"), (2, "mixed"), (2, "resident"), (3, "host"), (3, "nvme"), (4, "host"), (4, "mixed")],
)
def test_ranks_train_as_one_process(world_size, place, stage, ranks: RankPool, tmp_path):
    directory = tmp_path if place in ("nvme", "mixed") else None
    fits = ranks.run(world_size, train_sharded, model="tower", stage=stage, place=place, directory=directory)
    assert_trains_alike(agreed(fits), alone("tower", world_size), world_size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetching_changes_no_bit(depth, ranks: RankPool, tmp_path):
    fits = ranks.run(2, train_sharded, model="tower", place="mixed", directory=tmp_path, prefetch_depth=depth)
    assert_trains_alike(agreed(fits), alone("tower", 2), 2)


def test_batches_in_slices_train_alike(ranks: RankPool):
    fits = ranks.run(2, train_sharded, model="tower", num_batch_slices=2)
    assert_trains_alike(agreed(fits), alone("tower", 2, num_batch_slices=2), 2)


def test_a_tight_budget_moves_shards_to_disk(ranks: RankPool, tmp_path):
    fields = {"model": "llama", "directory": tmp_path, "placement": "auto", "host_budget": "4MiB"}
    fits = ranks.run(2, train_sharded, place="nvme", **fields)
    assert_trains_alike(agreed(fits), alone("llama", 2), 2)


@pytest.mark.parametrize("overlap", ["off", "next-forward"])
def test_overlap_changes_no_bit(overlap, ranks: RankPool, tmp_path):
    fits = ranks.run(2, train_sharded, model="tower", place="nvme", directory=tmp_path, overlap=overlap)
    assert_trains_alike(agreed(fits), alone("tower", 2), 2)


@STAGES
def test_gradients_accumulate(stage, ranks: RankPool):
    fits = ranks.run(2, train_sharded, model="gpt2", stage=stage, num_micro=2)
    expected = alone("gpt2", 2, num_micro=2)
    assert distance(agreed(fits).weights, expected.weights) < FLOAT32_TOLERANCE
    assert agreed(fits).norms == pytest.approx(expected.norms, rel=1e-6)


@pytest.mark.quick_cases(2)
@STAGES
@pytest.mark.parametrize("no_sync", ["but-last", "all"])
def test_accumulation_in_no_sync_changes_no_bit(no_sync, stage, ranks: RankPool):
    fields = {"model": "gpt2", "stage": stage, "num_micro": 2, "num_steps": 2}
    expected = agreed(ranks.run(2, train_sharded, **fields))
    found = agreed(ranks.run(2, train_sharded, **fields, no_sync=no_sync))
    assert same_bits(found.weights, expected.weights)
    assert (found.losses, found.norms) == (expected.losses, expected.norms)


@pytest.mark.quick_cases(2)
@STAGES
@pytest.mark.parametrize("world_size", [2, 3])
def test_clipping_uses_the_norm_over_all_ranks(world_size, stage, ranks: RankPool):
    adam = {"max_grad_norm": 0.01}
    fits = ranks.run(world_size, train_sharded, model="tower", stage=stage, adam=adam)
    expected = train_alone(model="tower", world_size=world_size, adam=adam)
    assert min(norm for norm in expected.norms if norm is not None) > 0.02  # so it does clip
    assert agreed(fits).norms == pytest.approx(expected.norms, rel=1e-6)
    assert distance(agreed(fits).weights, expected.weights) < FLOAT32_TOLERANCE


@STAGES
def test_frozen_parameters_keep_their_bits(stage, ranks: RankPool):
    fits = ranks.run(3, train_sharded, model="tower", stage=stage, place="device", frozen="blocks.1")
    expected = train_alone(model="tower", world_size=3, frozen="blocks.1")
    frozen = {name: value for name, value in expected.weights.items() if "blocks.1" in name}
    found = agreed(fits).weights
    assert same_bits({name: found[name] for name in frozen}, frozen)
    assert distance(found, expected.weights) < FLOAT32_TOLERANCE


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("place", ["host", "mixed", "resident"])
@pytest.mark.parametrize("stage", [1, 3])
def test_stage_and_placement_change_no_bit_in_bfloat16(stage, place, ranks: RankPool, tmp_path):
    directory = tmp_path if place == "mixed" else None
    fields = {"model": "gpt2", "dtype": torch.bfloat16, "num_steps": 2}
    first = agreed(ranks.run(2, train_sharded, stage=2, **fields))
    fits = ranks.run(2, train_sharded, stage=stage, place=place, directory=directory, **fields)
    assert same_bits(agreed(fits).weights, first.weights)
    assert distance(first.weights, alone(world_size=2, **fields).weights) < 2e-3


def test_gradients_kept_in_half_precision_train_alike(ranks: RankPool):
    fields = {"model": "gpt2", "dtype": torch.bfloat16, "num_steps": 2}
    first = ranks.run(2, train_sharded, **fields)
    fits = ranks.run(2, train_sharded, gradient_accumulation=False, **fields)
    assert same_bits(agreed(fits).weights, agreed(first).weights)


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: RankPool):
    fits = ranks.run(2, overflow_on_last_rank)
    assert [result["num_skipped"] for result in fits] == [1, 1]
    assert [result["scales"] for result in fits] == [[2.0**16, 2.0**15, 2.0**15]] * 2
    assert all(result["kept_weights"] for result in fits)
    assert same_bits(fits[0]["weights"], fits[1]["weights"])


@pytest.mark.parametrize(("stage", "num_micro", "num_exchanges"), [(1, 1, 1), (1, 3, 1), (2, 3, 3), (3, 3, 3)])
def test_ranks_agree_once_a_step(stage, num_micro, num_exchanges, ranks: RankPool):
    for counts, num_chunks in ranks.run(2, count_collectives, stage=stage, num_micro=num_micro):
        assert counts == {"gather_values": 1, "exchange": num_exchanges * num_chunks}


def test_backward_gathers_no_weights_for_a_lookup(ranks: RankPool):
    for counts in ranks.run(2, count_gathers_of_words, place="device"):
        assert counts == [1, 1, 1]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", [1, 3])
def test_exchanging_in_pieces_changes_no_bit(stage, world_size, ranks: RankPool):
    fields = {"model": "wide_head", "stage": stage, "num_micro": 2}
    whole, num_whole = ranks.run(world_size, train_in_pieces, piece_nbytes=1 << 30, **fields)[0]
    results = ranks.run(world_size, train_in_pieces, piece_nbytes=20_000, **fields)
    pieces = agreed([fit for fit, _ in results])
    assert results[0][1] > num_whole
    assert pieces.norms == whole.norms
    assert same_bits(pieces.weights, whole.weights)


@given(
    stride=st.integers(1, 9),
    begin=st.integers(0, 8),
    num_rows=st.integers(1, 4),
    at=st.integers(0, 20),
    numel=st.integers(1, 30),
)
def test_a_piece_holds_what_falls_into_it(stride, begin, num_rows, at, numel):
    row_numel = max(1, stride - begin)
    begin = min(begin, stride - 1)
    line = torch.zeros(num_rows * stride + at + numel)
    line[at : at + numel] = torch.arange(1.0, numel + 1)
    rows = torch.zeros(num_rows, row_numel)
    copy_piece(rows, line[at : at + numel].clone(), at=at - begin, stride=stride)
    assert torch.equal(rows, line[: num_rows * stride].view(num_rows, stride)[:, begin : begin + row_numel])


def test_means_in_float16_do_not_overflow():
    parts = torch.full((4, 2), 60_000.0, dtype=torch.float16)
    assert mean_of_sum(sum_of_parts(parts), 4, torch.float16).tolist() == [60_000.0, 60_000.0]


def test_means_are_rounded_once_from_a_float32_sum():
    parts = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    mean = mean_of_sum(sum_of_parts(parts), 4, torch.bfloat16)
    assert mean.item() == torch.tensor(259 / 4).to(torch.bfloat16).item() == 65.0
