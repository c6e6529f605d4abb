"""A rank that fails, dies or stalls ends the others with an error that names it, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from failing_ranks import build_on_ranks, train_until_fault
from fate import receive
from patience import PATIENCE_S
from rank_cases import differ_from_others
from rank_pool import Failure, RankGroup, RankPool

pytestmark = pytest.mark.processes


TIMEOUT_S = 0.15 * PATIENCE_S
"""Of groups whose ranks are killed: more than a busy machine may keep a living rank waiting."""
STALL_TIMEOUT_S = 0.06 * PATIENCE_S


@contextmanager
def group_of(world_size: int, timeout_s: float = TIMEOUT_S) -> Iterator[RankGroup]:
    group = RankGroup(world_size, timeout_s=timeout_s)
    group.call(build_on_ranks, {"fault": None})  # so that processes have started
    try:
        yield group
    finally:
        for process in group.processes:
            process.kill()
        group.close()


def failures_of(results: list[Any], ranks: list[int]) -> list[Failure]:
    found = [results[rank] for rank in ranks]
    assert all(isinstance(failure, Failure) for failure in found), found
    return found


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("when", ["forward", "backward", "step"])
def test_a_killed_rank_ends_the_others(when, tmp_path):
    with group_of(3) as group:
        results = group.call(train_until_fault, {"fault": "kill", "when": when, "directory": tmp_path})
    assert results[2].type_name == "Died"
    for failure in failures_of(results, [0, 1]):
        assert failure.type_name == "CollectiveError"
        assert "no response from rank 2, which has died or stalled" in failure.message
    assert any("blocks." in failure.message or "norms" in failure.message for failure in failures_of(results, [0, 1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stalled_rank_ends_the_others_within_the_timeout(tmp_path):
    with group_of(2, STALL_TIMEOUT_S) as group:
        for connection in group.connections:
            connection.send((train_until_fault, {"fault": "stall", "when": "forward", "directory": tmp_path}))
        results = [receive(group.connections[0])]  # the other never says anything again
    (failure,) = failures_of(results, [0])
    assert failure.type_name == "CollectiveError"
    assert "all-gather of chunk" in failure.message
    assert "no response from rank 1" in failure.message


@pytest.mark.slow
def test_an_engine_that_lost_a_rank_refuses_to_go_on(tmp_path):
    with group_of(2) as group:
        results = group.call(train_until_fault, {"fault": "kill", "when": "step", "directory": tmp_path, "again": True})
    (failure,) = failures_of(results, [0])
    assert "this group has failed before: " in failure.message


@pytest.mark.slow
def test_a_rank_that_closes_its_engine_early_is_named(tmp_path):
    with group_of(3) as group:
        results = group.call(train_until_fault, {"fault": "leave", "when": "", "directory": tmp_path})
    for failure in failures_of(results, [0, 1]):
        assert failure.type_name == "CollectiveError"
        assert "rank 2 has closed its engine" in failure.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_that_go_different_ways_are_told_where_the_others_were(tmp_path):
    with group_of(2, STALL_TIMEOUT_S) as group:
        results = group.call(train_until_fault, {"fault": "skip", "when": "", "directory": tmp_path})
    messages = [failure.message for failure in failures_of(results, [0, 1])]
    assert any("must run the same units in the same order" in message for message in messages)
    assert not any("all ranks are there" in message or "no response" in message for message in messages)


def test_ranks_that_run_other_units_are_found_out_before_weights_change(ranks: RankPool, tmp_path):
    results = ranks.try_run(2, train_until_fault, fault="stray", when="forward", directory=tmp_path)
    for failure in failures_of(results, [0, 1]):
        assert failure.type_name == "CollectiveError"
        assert "have called different collectives" in failure.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "type_name", "message"),
    [
        ("seed", "ModelError", "different first values of parameters"),
        ("model", "ModelError", "different models"),
        ("config", "ConfigError", "different configurations or stages"),
        ("speculative", "ConfigError", "is for one rank"),
    ],
)
def test_ranks_that_differ_are_refused(fault, type_name, message, ranks: RankPool):
    for failure in failures_of(ranks.try_run(2, build_on_ranks, fault=fault), [0, 1]):
        assert failure.type_name == type_name
        assert message in failure.message


@pytest.mark.parametrize(
    ("how", "first", "last"),
    [
        ("lr", "ConfigError: HybridAdam: ranks have different hyper-parameters", "ConfigError: HybridAdam: ranks have"),
        (
            "optimizer",
            "CheckpointMismatchError: rank 1 cannot load",
            "CheckpointMismatchError: HybridAdam: the state of",
        ),
        ("shape", "CheckpointMismatchError: rank 1 cannot load", "CheckpointMismatchError: load_state_dict:"),
        ("names", "CheckpointMismatchError: ranks were given", "CheckpointMismatchError: ranks were given"),
    ],
)
def test_ranks_that_would_drift_apart_are_stopped_before_anything_changes(how, first, last, ranks: RankPool):
    results = ranks.run(2, differ_from_others, how=how)
    for (message, keeps_weights), expected in zip(results, (first, last), strict=True):
        assert message.startswith(expected)
        assert keeps_weights


def test_a_rank_whose_init_fn_fails_does_not_keep_the_others_waiting(ranks: RankPool):
    results = ranks.try_run(2, build_on_ranks, fault="init_fn")
    assert results[1].type_name == "ZeroDivisionError"
    assert "rank 1 could not build its engine" in results[0].message


def test_a_rank_that_cannot_be_built_closes_the_others(ranks: RankPool, tmp_path):
    results = ranks.try_run(2, build_on_ranks, fault="directory", directory=tmp_path)
    assert results[1].type_name == "OffloadIOError"
    assert "rank 1 could not build its engine" in results[0].message
    assert list(tmp_path.iterdir()) == []


def test_budgets_are_the_least_of_all_ranks_and_shared(ranks: RankPool):
    budgets = ranks.run(2, build_on_ranks, fault="budget")
    assert budgets == [(32 << 20, 1), (32 << 20, 1)]
