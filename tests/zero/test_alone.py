"""What all ranks must do together ends, if one does it alone, in a typed error on each, long before any timeout."""

from __future__ import annotations

import pytest
from comparison import FLOAT32_TOLERANCE, alone
from failing_ranks import build_on_ranks
from lonely_ranks import act_alone, mix_collectives
from rank_pool import GROUP_TIMEOUT_S, RankGroup, RankPool
from training_harness import distance, same_bits

NOTICED_S = 20.0
"""Within which a busy machine notices; the groups' timeout is longer."""


PAIRS = [
    ("state_dict", "train"),
    ("state_dict", "evaluate"),
    ("module.state_dict", "train"),
    ("optimizer.state_dict", "train"),
    ("save_checkpoint", "train"),
    ("load_checkpoint", "train"),
    ("load_state_dict", "train"),
    ("clip", "train"),
    ("state_dict", "save_checkpoint"),
    ("master_state_dict", "optimizer.state_dict"),
    ("load_checkpoint", "state_dict"),
]


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(("lonely", "meanwhile"), PAIRS)
def test_what_one_rank_does_alone_ends_all_in_time(lonely, meanwhile, stage, ranks: RankPool, tmp_path) -> None:
    arguments = {"alone": lonely, "meanwhile": meanwhile, "stage": stage, "directory": tmp_path}
    for kind, message, seconds in ranks.run(2, act_alone, **arguments):
        assert kind == "CollectiveError"
        assert "state_dict and the like" in message or "has failed before, in the" in message
        assert seconds < NOTICED_S < GROUP_TIMEOUT_S


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ["barrier", "all_reduce"])
def test_a_collective_of_the_users_never_meets_ours(theirs, tmp_path) -> None:
    group = RankGroup(2, timeout_s=8.0)
    try:
        group.call(build_on_ranks, {"fault": None})
        arguments = {"alone": "state_dict", "meanwhile": theirs, "stage": 3, "directory": tmp_path}
        (kind, message, _), *_ = group.call(act_alone, arguments)
        assert kind == "CollectiveError"
        # The other's own collective may run out of time first, and end its engine.
        assert "no response from rank 1, which has died or stalled, or waits elsewhere" in message or (
            "rank 1 has closed its engine" in message
        )
    finally:
        group.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_collectives_of_the_users_may_be_under_way_at_any_time(stage, ranks: RankPool) -> None:
    first, second = ranks.run(2, mix_collectives, stage=stage)
    assert same_bits(first, second)
    assert distance(first, alone("tower", 2).weights) < FLOAT32_TOLERANCE
