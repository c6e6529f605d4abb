"""Replicas of shards: a mesh of two dimensions trains as one does, and as one process."""

from __future__ import annotations

import pytest
import torch
from comparison import FLOAT32_TOLERANCE, STAGES, agreed, alone, assert_trains_alike
from failing_ranks import train_until_fault
from rank_cases import (
    count_collectives,
    measure_memory,
    overflow_on_last_rank,
    save_and_load,
    train_alone,
    train_sharded,
)
from rank_pool import RankPool
from test_failures import failures_of, group_of
from training_harness import distance, same_bits

from gemini.tiers import MemoryTier

pytestmark = pytest.mark.processes


@pytest.mark.quick_cases(2)
@STAGES
@pytest.mark.parametrize("place", ["host", "mixed"])
def test_replicas_train_as_one_process(place, stage, ranks: RankPool, tmp_path):
    directory = tmp_path if place == "mixed" else None
    found = agreed(
        ranks.run(4, train_sharded, model="tower", stage=stage, place=place, directory=directory, mesh=(2, 2))
    )
    expected = alone("tower", 4)
    assert distance(found.weights, expected.weights) < FLOAT32_TOLERANCE
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (1, 3)], ids=str)
def test_a_mesh_with_one_rank_in_a_dimension_trains_alike(mesh, ranks: RankPool):
    world_size = max(mesh)
    fits = ranks.run(world_size, train_sharded, model="tower", mesh=mesh)
    assert_trains_alike(agreed(fits), alone("tower", world_size), world_size)


@pytest.mark.slow
def test_one_replica_has_the_bits_of_a_plain_group(ranks: RankPool):
    plain, hybrid = (agreed(ranks.run(3, train_sharded, model="tower", mesh=mesh)) for mesh in (None, (1, 3)))
    assert same_bits(hybrid.weights, plain.weights)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("mesh", [(2, 2), (4, 1)], ids=str)
def test_replicas_in_bfloat16_have_one_set_of_bits(mesh, ranks: RankPool):
    fields = {"model": "gpt2", "dtype": torch.bfloat16, "num_steps": 2}
    found = agreed(ranks.run(4, train_sharded, mesh=mesh, **fields))
    assert distance(found.weights, alone(world_size=4, **fields).weights) < 2e-3


@pytest.mark.parametrize("depth", [0, 2])
def test_replicas_that_lack_gradients_do_not_hold_up_others(depth, ranks: RankPool):
    fields = {"model": "patchy", "num_steps": 4}
    fits = ranks.run(4, train_sharded, place="device", prefetch_depth=depth, mesh=(2, 2), **fields)
    assert distance(agreed(fits).weights, alone(world_size=4, **fields).weights) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("stage", [1, 3])
def test_replicas_accumulate_and_clip(stage, ranks: RankPool):
    fields = {"model": "tower", "num_micro": 2, "adam": {"max_grad_norm": 0.01}}
    found = agreed(ranks.run(4, train_sharded, stage=stage, mesh=(2, 2), **fields))
    expected = train_alone(world_size=4, **fields)
    assert min(norm for norm in expected.norms if norm is not None) > 0.02  # so it does clip
    assert found.norms == pytest.approx(expected.norms, rel=1e-6)
    assert distance(found.weights, expected.weights) < FLOAT32_TOLERANCE


def test_an_overflow_in_one_replica_skips_the_step_on_all(ranks: RankPool):
    results = ranks.run(4, overflow_on_last_rank, mesh=(2, 2))
    assert [result["num_skipped"] for result in results] == [1] * 4
    assert [result["scales"] for result in results] == [[2.0**16, 2.0**15, 2.0**15]] * 4
    assert all(result["kept_weights"] for result in results)
    assert all(same_bits(result["weights"], results[0]["weights"]) for result in results)


def test_a_checkpoint_of_replicas_goes_on_with_the_same_bits(ranks: RankPool, tmp_path):
    for result in ranks.run(4, save_and_load, stage=2, place="nvme", directory=tmp_path, mesh=(2, 2)):
        assert same_bits(result["again"], result["through"])


def test_replicas_hold_shards_of_their_own_dimension(ranks: RankPool):
    fields = {"model": "tower", "stage": 3, "place": "device", "directory": None}
    hybrid, plain = (ranks.run(n, measure_memory, mesh=mesh, **fields)[0] for n, mesh in ((4, (2, 2)), (2, None)))
    assert hybrid["held"] == plain["held"]
    assert hybrid["peak"] == plain["peak"]
    assert hybrid["held"][MemoryTier.HOST]["state"] > 0


def test_replicas_agree_once_a_step_and_exchange_twice_a_chunk(ranks: RankPool):
    for counts, num_chunks in ranks.run(4, count_collectives, stage=3, num_micro=1, mesh=(2, 2)):
        assert counts == {"gather_values": 1, "exchange": 2 * num_chunks}


@pytest.mark.slow
def test_a_killed_rank_ends_all_replicas(tmp_path):
    with group_of(4) as group:
        arguments = {"fault": "kill", "when": "backward", "directory": tmp_path, "mesh": (2, 2)}
        results = group.call(train_until_fault, arguments)
    assert results[3].type_name == "Died"
    failures = failures_of(results, [0, 1, 2])
    assert [failure.type_name for failure in failures] == ["CollectiveError"] * 3
    assert all("no response from rank 3, which has died or stalled" in failure.message for failure in failures)
    assert list(tmp_path.iterdir()) == []
