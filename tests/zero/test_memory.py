"""What a rank takes is what the formula says: states, homes and traffic fall with the number of ranks."""

from __future__ import annotations

import pytest
from rank_cases import measure_memory
from rank_pool import RankPool

from gemini.tiers import MemoryTier, round_up

FLOAT32_NBYTES = 4


def shard_nbytes(numel: int, world_size: int) -> int:
    return round_up(-(-numel // world_size) * FLOAT32_NBYTES, 4096)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_host_memory_is_that_of_the_formula(world_size, stage, ranks: RankPool):
    result = ranks.run(world_size, measure_memory, model="tower", stage=stage, place="device", directory=None)[0]
    shards = [shard_nbytes(numel, world_size) for numel, _ in result["numels"]]
    whole = {world_size * nbytes: is_root for nbytes, (_, is_root) in zip(shards, result["numels"], strict=True)}
    assert not any(whole.values())  # the tower has nothing in its root unit
    expected_host = {
        "working": sum(shards),
        "state": 2 * sum(shards),  # momentum and variance, float32 as the weights
        "gradients": sum(shards),
        "gradient slots": 2 * max(shards),  # a shard's way from the device
    }
    expected_device = {"gradient slots": 2 * max(shards), "exchange slots": 4 * max(whole)}
    expected_device |= {"slots": 3 * max(whole)} if stage == 3 else {"resident copies": world_size * sum(shards)}
    if stage == 1:
        expected_device["whole gradients"] = world_size * sum(shards)
    assert result["planned"][MemoryTier.HOST] == expected_host
    assert result["planned"][MemoryTier.DEVICE] == expected_device
    assert result["held"][MemoryTier.HOST] == expected_host
    assert result["held"][MemoryTier.DEVICE] == expected_device
    assert result["peak"][MemoryTier.DEVICE] == sum(expected_device.values())


def test_states_and_traffic_fall_with_the_number_of_ranks(ranks: RankPool, tmp_path):
    two, four = (
        ranks.run(world_size, measure_memory, model="gpt2", stage=3, place="nvme", directory=tmp_path)[0]
        for world_size in (2, 4)
    )
    for result, world_size in ((two, 2), (four, 4)):
        shards = [shard_nbytes(numel, world_size) for numel, _ in result["numels"]]
        assert result["planned"][MemoryTier.NVME]["state"] == 2 * sum(shards)
    assert four["fetched_nbytes"] < 0.6 * two["fetched_nbytes"]
