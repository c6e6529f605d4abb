"""Models with awkward habits train on many ranks as in one process."""

from __future__ import annotations

import pytest
from comparison import STAGES, agreed, alone, assert_trains_alike
from rank_cases import train_sharded
from rank_pool import RankPool

AWKWARD = [
    "gpt2",
    "mixtral",
    "albert",
    "t5",
    "borrowers",
    "hidden_borrowers",
    "routed",
    "lenders",
    "tiny",
    "with_nothing",
    "checkpointed",
]


@pytest.mark.quick_cases(8)
@STAGES
@pytest.mark.parametrize("model", [*AWKWARD, "checkpointed_reentrant"])
def test_awkward_models_train_as_in_one_process(model, stage, ranks: RankPool):
    fits = ranks.run(2, train_sharded, model=model, stage=stage, place="device")
    assert_trains_alike(agreed(fits), alone(model, 2), 2)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_ranks_that_lack_gradients_do_not_hold_up_others(depth, ranks: RankPool):
    fields = {"model": "patchy", "num_steps": 6}
    fits = ranks.run(2, train_sharded, place="device", prefetch_depth=depth, **fields)
    assert_trains_alike(agreed(fits), alone(world_size=2, **fields), 2)


@pytest.mark.slow
def test_more_ranks_than_a_chunk_has_blocks(ranks: RankPool):
    fits = ranks.run(4, train_sharded, model="tiny", place="host")
    assert_trains_alike(agreed(fits), alone("tiny", 4), 4)
