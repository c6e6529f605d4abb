"""Gradients that meet in host memory: the bits of collectives, bounded memory, and an error when a rank is lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from comparison import STAGES, agreed
from host_cases import (
    add_up,
    add_up_plainly,
    ask_for_different_sums,
    choose_as_if_on_gpus,
    count_what_is_left,
    has_host_memory,
    shard_on_machines,
    shard_without_memory_files,
    train_alone_in_a_group,
    train_until_killed,
    wait_elsewhere_while_others_add,
)
from patience import PATIENCE_S
from rank_cases import (
    measure_memory,
    overflow_on_last_rank,
    resume_checkpoint,
    save_checkpoint,
    train_in_pieces,
    train_sharded,
)
from rank_pool import RankGroup, RankPool
from tensor_ranks import train_divided
from training_harness import same_bits

from gemini.offload.memory_file import F_SEAL_FUTURE_WRITE
from gemini.tiers import MemoryTier, round_up
from zero.host_meeting import lacks_peer_access

pytestmark = pytest.mark.processes

NUMELS = [1, 3, 4097, 1024, 2, 4096, 30_001]
EXCHANGES = ("host", "collective")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


# ---------------------------------------------------------------- sums by themselves


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums_are_plain_torchs_in_rank_order_and_collectives(world_size, dtype, ranks: RankPool):
    fields = {"numels": NUMELS, "dtype": dtype}
    found = ranks.run(world_size, add_up, **fields)
    plain = ranks.run(world_size, add_up_plainly, **fields)
    collective = ranks.run(world_size, add_up, exchange="collective", **fields)
    for rank in range(world_size):
        assert same(found[rank], plain[rank])
        assert same(found[rank], collective[rank])


@pytest.mark.parametrize("place", ["host", "device"])
def test_sums_that_are_not_divided_stay_in_float32(place, ranks: RankPool):
    fields = {"numels": NUMELS, "dtype": torch.bfloat16, "is_total": True}
    found, plain = ranks.run(3, add_up, place=place, **fields), ranks.run(3, add_up_plainly, **fields)
    assert all(map(same, found, plain))


def test_slots_are_filled_again_and_again(ranks: RankPool):
    fields = {"numels": [97, 5] * 150, "dtype": torch.float32}
    found, plain = ranks.run(3, add_up, **fields), ranks.run(3, add_up_plainly, **fields)
    assert all(map(same, found, plain))


def test_a_rank_that_waits_elsewhere_holds_up_nobodys_sum(ranks: RankPool):
    assert ranks.run(3, wait_elsewhere_while_others_add) == [[6.0] * 4] * 3


def test_ranks_that_ask_for_different_sums_are_told(ranks: RankPool):
    failures = ranks.try_run(2, ask_for_different_sums)
    assert [failure.type_name for failure in failures] == ["CollectiveError"] * 2
    assert all("have called different collectives" in failure.message for failure in failures)


# ---------------------------------------------------------------- training


def assert_exchanges_alike(ranks: RankPool, world_size: int, **fields: Any) -> None:
    """Check that host memory and collectives give the same bits everywhere."""
    found = agreed(ranks.run(world_size, train_sharded, exchange="host", **fields))
    expected = agreed(ranks.run(world_size, train_sharded, exchange="collective", **fields))
    assert same_bits(found.weights, expected.weights)
    assert (found.losses, found.norms, found.num_skipped) == (expected.losses, expected.norms, expected.num_skipped)


@pytest.mark.quick_cases(4)
@STAGES
@pytest.mark.parametrize(
    ("world_size", "place"),
    [(2, "host"), (3, "host"), (4, "host"), (3, "device"), (2, "mixed"), (2, "nvme"), (2, "resident")],
)
def test_training_has_the_bits_of_collectives(world_size, place, stage, ranks: RankPool, tmp_path):
    directory = tmp_path if place in ("nvme", "mixed") else None
    assert_exchanges_alike(ranks, world_size, model="tower", stage=stage, place=place, directory=directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "place"), [(1, "host"), (3, "device")])
def test_one_rank_exchanges_with_itself(stage, place, ranks: RankPool):
    fields = {"stage": stage, "place": place}
    (found,) = ranks.run(1, train_alone_in_a_group, exchange="host", **fields)
    (expected,) = ranks.run(1, train_alone_in_a_group, exchange="collective", **fields)
    assert same_bits(found.weights, expected.weights)


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"model": "patchy", "num_steps": 4}, id="unused parameters"),
        pytest.param({"model": "routed", "place": "device"}, id="experts"),
        pytest.param({"model": "lenders"}, id="latecomers"),
        pytest.param({"model": "tiny"}, id="odd sizes"),
        pytest.param({"model": "wide_head", "stage": 2}, id="a chunk of one parameter"),
        pytest.param({"model": "gpt2", "num_micro": 2}, id="accumulation"),
        pytest.param({"model": "gpt2", "num_micro": 2, "stage": 1, "place": "device"}, id="accumulation in stage 1"),
        pytest.param({"model": "tower", "adam": {"max_grad_norm": 0.01}}, id="clipping"),
        pytest.param({"model": "gpt2", "dtype": torch.bfloat16}, id="bfloat16"),
        pytest.param({"model": "gpt2", "dtype": torch.bfloat16, "gradient_accumulation": False}, id="half gradients"),
        pytest.param({"model": "adapted", "place": "device"}, id="frozen weights"),
        pytest.param({"model": "adapted", "share_frozen": False}, id="frozen weights in shards"),
        pytest.param({"model": "tower", "num_batch_slices": 2}, id="slices"),
        pytest.param({"model": "tower", "prefetch_depth": 3, "place": "device"}, id="prefetching"),
    ],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_habits_of_models_and_loops_change_no_bit(world_size, fields, ranks: RankPool):
    if world_size == 3 and "num_batch_slices" in fields:
        fields = {**fields, "num_batch_slices": 1}
    assert_exchanges_alike(ranks, world_size, **fields)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("mesh", [(1, 4), (2, 2), (4, 1)])
def test_replicas_add_up_what_met_in_host_memory(mesh, ranks: RankPool):
    assert_exchanges_alike(ranks, 4, model="tower", mesh=mesh, place="device" if mesh == (2, 2) else "host")


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("sizes", [(2, 2), (1, 2)], ids=str)
def test_parts_of_divided_parameters_meet_too(sizes, ranks: RankPool):
    fields = {"model": "llama", "sizes": sizes, "stage": 3}
    world_size = sizes[0] * sizes[1]
    found, expected = (agreed(ranks.run(world_size, train_divided, exchange=e, **fields)) for e in EXCHANGES)
    assert same_bits(found.weights, expected.weights)
    assert (found.losses, found.norms) == (expected.losses, expected.norms)


def test_pieces_change_no_bit(ranks: RankPool):
    fields = {"model": "wide_head", "num_micro": 2}
    whole = agreed([each for each, _ in ranks.run(2, train_in_pieces, piece_nbytes=1 << 30, **fields)])
    pieces = agreed([each for each, _ in ranks.run(2, train_in_pieces, piece_nbytes=20_000, exchange="host", **fields)])
    assert same_bits(pieces.weights, whole.weights)


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: RankPool):
    found, expected = (ranks.run(2, overflow_on_last_rank, exchange=exchange) for exchange in EXCHANGES)
    assert [result["num_skipped"] for result in found] == [1, 1]
    assert same_bits(found[0]["weights"], expected[0]["weights"])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 2), (2, 3), (3, 2)])
def test_checkpoints_go_into_another_number_of_ranks(saved_by, loaded_by, ranks: RankPool, tmp_path):
    fields = {"stage": 3, "place": "host", "directory": tmp_path / "run", "exchange": "host"}
    saved = ranks.run(saved_by, save_checkpoint, wait=True, **fields)
    for result in ranks.run(loaded_by, resume_checkpoint, **fields):
        assert result["step"] == 2
        if saved_by == loaded_by:
            assert same_bits(result["through"].weights, saved[0].weights)


def train_in(group: RankGroup, results: list[Any]) -> None:
    results += group.call(train_sharded, {"model": "tower", "exchange": "host", "num_steps": 6})


@pytest.mark.slow
def test_two_trainings_at_once_do_not_meet(ranks: RankPool):
    expected = agreed(ranks.run(2, train_sharded, model="tower", exchange="collective", num_steps=6))
    groups = [RankGroup(2), RankGroup(2)]
    results: list[list[Any]] = [[], []]
    threads = [threading.Thread(target=train_in, args=pair) for pair in zip(groups, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for group in groups:
        group.close()
    for found in results:
        assert same_bits(agreed(found).weights, expected.weights)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_slots_are_what_is_planned(world_size, place, ranks: RankPool):
    results = ranks.run(
        world_size, measure_memory, model="tower", stage=3, place=place, directory=None, exchange="host"
    )
    for result in results:
        largest = max(world_size * round_up(-(-numel // world_size) * 4, 4096) for numel, _ in result["numels"])
        assert result["planned"][MemoryTier.HOST]["exchange slots"] == 2 * largest + 4096
        assert result["planned"][MemoryTier.DEVICE].get("exchange slots", 0) == (
            2 * largest if place == "device" else 0
        )
        assert "gradient slots" not in result["planned"][MemoryTier.DEVICE]
        assert result["held"] == result["planned"]


def test_nothing_stays_behind(ranks: RankPool):
    for result in ranks.run(3, count_what_is_left, model="tower", exchange="host"):
        assert result["num_mapped"] == 3
        assert result["num_left"] == 0
        assert result["after"] == result["before"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("where", ["publish", "take", "add"])
def test_a_rank_that_is_killed_in_an_exchange_ends_the_others(where, place):
    group = RankGroup(3, timeout_s=0.5 * PATIENCE_S)
    try:
        first = group.call(count_what_is_left, {"model": "tower", "exchange": "host"})[0]
        results = group.call(train_until_killed, {"where": where, "place": place})
    finally:
        for process in group.processes:
            process.kill()
        group.close()
    assert results[2].type_name == "Died"
    for result in results[:2]:
        assert "no response from rank 2, which has died or stalled" in result["message"]
        assert result["num_left"] == 0
        assert result["shm"] == first["before"][1]


# ---------------------------------------------------------------- the choice


def test_cpu_ranks_use_collectives_unless_told_otherwise(ranks: RankPool):
    assert ranks.run(2, has_host_memory) == [False, False]
    assert ranks.run(2, has_host_memory, exchange="collective") == [False, False]
    assert ranks.run(2, has_host_memory, exchange="host") == [True, True]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("fields", "meets"),
    [
        pytest.param({"unreachable": []}, False, id="all reach each other"),
        pytest.param({"unreachable": [(0, 2), (2, 0)]}, True, id="one pair does not"),
        pytest.param({"unreachable": [(1, 0)]}, True, id="one way"),
        pytest.param({"unreachable": [(0, 2), (2, 0)], "hidden": True}, False, id="not known"),
        pytest.param({"unreachable": [(0, 2), (2, 0)], "machines": 3}, False, id="several machines"),
    ],
)
def test_gpus_that_cannot_reach_each_other_let_their_ranks_meet_in_host_memory(fields, meets, ranks: RankPool):
    assert ranks.run(3, choose_as_if_on_gpus, **fields) == [meets] * 3


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("machines", [["a", "b", "b"], ["a", "b", "a"], ["a", "b", "c"]])
def test_ranks_of_several_machines_are_refused_on_all(machines, ranks: RankPool):
    for failure in ranks.try_run(3, shard_on_machines, machines=machines, exchange="host"):
        assert failure.type_name == "ConfigError"
        assert 'GeminiConfig.exchange: "host" is for ranks of one machine' in failure.message
        assert 'choose "collective"' in failure.message


def test_replicas_may_be_on_several_machines(ranks: RankPool):
    fields = {"mesh": (2, 2), "num_steps": 2}
    found = agreed(ranks.run(4, shard_on_machines, machines=["a", "a", "b", "b"], exchange="host", **fields))
    expected = agreed(ranks.run(4, train_sharded, model="tower", exchange="collective", **fields))
    assert same_bits(found.weights, expected.weights)


def test_ranks_that_cannot_see_each_others_memory_are_refused_on_all(ranks: RankPool):
    for failure in ranks.try_run(2, shard_without_memory_files, exchange="host"):
        assert failure.type_name == "ConfigError"
        assert "needs ranks that see each other's memory files" in failure.message


@pytest.mark.parametrize(
    ("others", "reachable", "lacks"),
    [
        (["b"], {(0, 1)}, False),
        (["b"], set(), True),
        (["b", "c"], {(0, 1)}, True),
        (["hidden"], set(), False),
        (["a"], set(), False),
        ([], set(), False),
    ],
)
def test_peer_access_is_asked_for_between_visible_devices(others, reachable, lacks):
    visible = {"a": 0, "b": 1, "c": 2}
    assert lacks_peer_access(0, others, visible, lambda own, other: (own, other) in reachable) is lacks


def test_files_take_no_further_mappings(ranks: RankPool):
    for result in ranks.run(2, count_what_is_left, model="tower", exchange="host"):
        assert all(seals & F_SEAL_FUTURE_WRITE for seals in result["seals"])
