"""Weights that ranks read where they live: one copy in host memory a machine, and never one that is half new."""

from __future__ import annotations

from functools import cache
from typing import Any

import async_device
import pytest
import torch
from access_cases import train_moving
from comparison import STAGES, agreed
from host_cases import train_until_killed
from patience import PATIENCE_S
from rank_cases import Fit
from rank_pool import RankGroup, RankPool
from training_harness import same_bits
from weights_cases import (
    gather_what_changes,
    measure_weights,
    train_on_async_device,
    write_in_place_between_steps,
    write_while_another_reads,
)

from gemini.tiers import MemoryTier

pytestmark = pytest.mark.processes

HOST = MemoryTier.HOST
DELAYS = {
    "prompt": {},
    "late copies": {"max_copy_delay_us": 3000, "seed": 1},
    "late kernels": {"max_kernel_delay_us": 100, "seed": 2},
    "last copies": {"has_lazy_copies": 1},
    "last kernels": {"has_lazy_kernels": 1},
}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_gather_finds_what_all_ranks_last_wrote(world_size, place, ranks: RankPool):
    for found in ranks.run(world_size, gather_what_changes, num_rounds=100, place=place):
        for number, row in enumerate(found):
            assert row == [(3 * number + chunk + rank) % 251 for chunk in range(2) for rank in range(world_size)]


def test_a_home_is_not_written_while_another_rank_reads_it(ranks: RankPool):
    assert ranks.run(3, write_while_another_reads)[0] == (False, True)


@pytest.mark.quick_cases(2)
@STAGES
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_collective_carries_weights_and_host_memory_has_one_copy(world_size, place, stage, ranks: RankPool):
    results = ranks.run(world_size, measure_weights, stage=stage, place=place, exchange="host")
    planned = results[0]["planned"][HOST]
    for result in results:
        assert result["gathered"] == []
        assert result["num_copied"] > 0
        assert result["planned"][HOST]["working"] * world_size == result["whole_nbytes"]
        assert result["held"] == result["planned"]
    file_nbytes = planned["working"] + planned["exchange slots"]
    assert sum(result["pss_nbytes"] for result in results) <= world_size * file_nbytes


@pytest.mark.parametrize("place", ["nvme", "resident"])
def test_weights_elsewhere_are_gathered_as_ever(place, ranks: RankPool, tmp_path):
    directory = tmp_path if place == "nvme" else None
    for result in ranks.run(2, measure_weights, stage=3, place=place, directory=directory, exchange="host"):
        assert result["num_copied"] == 0
        assert any("blocks" in name for name in result["gathered"])


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("place", "stage"), [("host", 3), ("device", 3), ("host", 1), ("device", 1)])
def test_writing_and_loading_between_steps_changes_no_bit(place, stage, dtype, ranks: RankPool):
    fields = {"place": place, "stage": stage, "dtype": dtype}
    found, expected = (ranks.run(2, write_in_place_between_steps, exchange=e, **fields) for e in ("host", "collective"))
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[0])


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("world_size", "place", "stage"), [(2, "host", 3), (4, "device", 3), (2, "host", 1)])
def test_models_that_write_their_weights_see_what_one_process_sees(world_size, place, stage, dtype, ranks: RankPool):
    fields = {"place": place, "directory": None, "dtype": dtype}
    right = train_moving(stage=None, **fields)
    for found in ranks.run(world_size, train_moving, stage=stage, exchange="host", **fields):
        assert all(map(torch.equal, found["seen"], right["seen"]))
        assert same_bits(found["masters"], right["masters"])


def on_async_device(world_size: int, **fields: Any) -> list[Fit]:
    """Train in processes that have had no backward, and so no threads of autograd that lack the device."""
    group = RankGroup(world_size)
    try:
        results = group.call(train_on_async_device, fields)
    finally:
        group.close()
    assert all(isinstance(result, Fit) for result in results), results
    return results


@cache
def alone_on_async_device(num_parts: int) -> Fit:
    return on_async_device(1, num_parts=num_parts, stage=None, options={})[0]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("delays", DELAYS)
@pytest.mark.parametrize(("world_size", "stage", "depth"), [(2, 3, 2), (2, 3, 0), (2, 1, 1), (4, 3, 1)])
def test_an_asynchronous_device_trains_as_one_process(world_size, stage, depth, delays):
    async_device.compiled()  # or skip
    fields = {"stage": stage, "exchange": "host", "prefetch_depth": depth, "options": DELAYS[delays]}
    found = agreed(on_async_device(world_size, num_parts=world_size, **fields))
    expected = alone_on_async_device(world_size)
    assert same_bits(found.weights, expected.weights)
    assert found.norms == expected.norms


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("where", ["offer", "note_read"])
def test_a_rank_that_is_killed_in_a_gather_ends_the_others(where, place):
    group = RankGroup(3, timeout_s=0.5 * PATIENCE_S)
    try:
        results = group.call(train_until_killed, {"where": where, "place": place})
    finally:
        for process in group.processes:
            process.kill()
        group.close()
    assert results[2].type_name == "Died"
    for result in results[:2]:
        assert "no response from rank 2, which has died or stalled" in result["message"]
        assert result["num_left"] == 0
