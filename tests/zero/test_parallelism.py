"""Sharding beside other kinds of parallelism, which docs/parallelism.md tells of."""

from __future__ import annotations

import pytest
from comparison import FLOAT32_TOLERANCE, alone
from parallel_cases import train_pipeline, train_sequences, train_sequences_alone, train_zero_bubble
from rank_pool import RankPool
from training_harness import distance, same_bits


def joined(stages: list[dict]) -> dict:
    return {name: weight for weights in stages for name, weight in weights.items()}


@pytest.mark.parametrize("place", ["host", "nvme"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_pipeline_stages_train_as_one_process(schedule, place, ranks: RankPool, tmp_path):
    stages = ranks.run(2, train_pipeline, schedule=schedule, place=place, directory=tmp_path, num_micro=4)
    assert same_bits(joined(stages), alone("tower", 1, num_micro=4).weights)


@pytest.mark.parametrize("place", ["host", "nvme"])
def test_pipeline_stages_are_shared_by_ranks(place, ranks: RankPool, tmp_path):
    stages = ranks.run(4, train_pipeline, schedule="1f1b", place=place, directory=tmp_path, num_micro=2)
    assert same_bits(stages[0], stages[2])
    assert same_bits(stages[1], stages[3])
    assert distance(joined(stages), alone("tower", 2, num_micro=2).weights) < FLOAT32_TOLERANCE


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("place", ["host", "nvme", "device"])
@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_zero_bubble_stages_train_as_one_process(schedule, place, ranks: RankPool, tmp_path):
    """These schedules write the gradients of weights to .grad by themselves."""
    stages = ranks.run(2, train_zero_bubble, schedule=schedule, place=place, directory=tmp_path, num_micro=4)
    assert distance(joined(stages), alone("tower", 1, num_micro=4).weights) < FLOAT32_TOLERANCE


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(("stage", "place"), [(1, "host"), (2, "nvme"), (3, "nvme")])
@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_zero_bubble_stages_are_shared_by_ranks(schedule, stage, place, ranks: RankPool, tmp_path):
    fields = {"schedule": schedule, "place": place, "directory": tmp_path, "num_micro": 4, "stage": stage}
    stages = ranks.run(4, train_zero_bubble, **fields)
    assert same_bits(stages[0], stages[2])
    assert same_bits(stages[1], stages[3])
    assert distance(joined(stages[:2]), alone("tower", 2, num_micro=4).weights) < FLOAT32_TOLERANCE


def test_gradients_are_not_for_a_schedule_to_scale(ranks: RankPool, tmp_path):
    fields = {"schedule": "gpipe", "place": "host", "directory": tmp_path, "num_micro": 4}
    with pytest.raises(AssertionError, match=r"ModelError: torch\.div_ would change the gradient .* scale_grads=False"):
        ranks.run(2, train_pipeline, **fields, scale_grads=True)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("has_own_group", [True, False])
@pytest.mark.parametrize(("stage", "place"), [(1, "host"), (2, "nvme"), (3, "host"), (3, "nvme")])
def test_parts_of_sequences_train_as_whole_ones(stage, place, has_own_group, ranks: RankPool, tmp_path):
    directory = tmp_path if place == "nvme" else None
    fields = {"stage": stage, "place": place, "directory": directory, "has_own_group": has_own_group}
    found, other = ranks.run(2, train_sequences, **fields)
    assert same_bits(found, other)
    assert distance(found, train_sequences_alone()) < FLOAT32_TOLERANCE
