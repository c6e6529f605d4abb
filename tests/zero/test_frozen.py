"""Frozen weights in host memory are there once for the ranks of a machine, and nobody gathers them."""

from __future__ import annotations

import pytest
import torch
from comparison import agreed
from frozen_cases import (
    FROZEN,
    MODEL,
    load_and_read,
    measure_on_machines,
    measure_sharing,
    overwrite_and_restore,
    read_first_values,
    shard_with_a_hidden_file,
    train_while_the_first_rank_dies,
)
from patience import PATIENCE_S
from rank_cases import case_of, train_sharded
from rank_pool import RankGroup, RankPool
from training_harness import same_bits

from gemini import MemoryTier
from gemini.offload.memory_file import F_SEAL_FUTURE_WRITE

pytestmark = pytest.mark.processes


KIB = 1 << 10
HOST = MemoryTier.HOST


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("world_size", "place", "stage"),
    [
        (2, "host", 1),
        (2, "host", 2),
        (2, "host", 3),
        (3, "host", 3),
        (2, "device", 1),
        (3, "device", 3),
        (2, "mixed", 3),
        (2, "nvme", 3),
    ],
)
def test_sharing_changes_no_bit(world_size, place, stage, ranks: RankPool, tmp_path):
    directory = tmp_path if place in ("mixed", "nvme") else None
    fields = {"model": MODEL, "stage": stage, "place": place, "directory": directory}
    fits = ranks.run(world_size, train_sharded, **fields)
    expected = ranks.run(world_size, train_sharded, share_frozen=False, **fields)
    assert same_bits(agreed(fits).weights, agreed(expected).weights)
    assert [fit.losses for fit in fits] == [fit.losses for fit in expected]


def test_sharing_changes_no_bit_in_bfloat16(ranks: RankPool):
    fields = {"model": "gpt2", "frozen": "h.", "dtype": torch.bfloat16, "num_steps": 2}
    fits = ranks.run(2, train_sharded, **fields)
    expected = ranks.run(2, train_sharded, share_frozen=False, **fields)
    assert same_bits(agreed(fits).weights, agreed(expected).weights)


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize(("world_size", "stage"), [(2, 1), (2, 3), (3, 3)])
def test_a_machine_has_one_copy_and_nobody_gathers_it(world_size, stage, place, ranks: RankPool):
    results = ranks.run(world_size, measure_sharing, stage=stage, place=place)
    first = results[0]
    pss_nbytes = sum(result["pss_nbytes"] for result in results)
    assert first["frozen_nbytes"] - 8 * KIB * world_size <= pss_nbytes <= first["whole_nbytes"]
    for result in results:
        assert not any("base" in name for name in result["gathered"])
        assert any("down" in name for name in result["gathered"])  # what is trained
        assert result["dirtied_nbytes"] == 0
        assert result["seals"]
        assert all(seals & F_SEAL_FUTURE_WRITE for seals in result["seals"])
        assert result["held"] == result["planned"]
        assert result["planned"][HOST]["shared weights"] * world_size == first["whole_nbytes"]
        assert result["num_left"] == 0
        assert result["num_new_descriptors"] <= 0


def test_in_host_memory_frozen_weights_are_used_where_they_are(ranks: RankPool):
    shared, cut = (
        ranks.run(2, measure_sharing, stage=3, place="host", share_frozen=share)[0] for share in (True, False)
    )
    assert (shared["num_resident"], cut["num_resident"]) == (4, 0)
    assert shared["planned"][HOST]["slots"] == 4 * 2 * 4 * KIB  # of what is trained, two shards of a block each
    assert cut["planned"][HOST]["slots"] == 4 * 2 * 24 * KIB
    assert cut["pss_nbytes"] == 0
    assert any("base" in name for name in cut["gathered"])


@pytest.mark.parametrize("place", ["nvme", "resident"])
def test_weights_elsewhere_are_cut_as_ever(place, ranks: RankPool, tmp_path):
    directory = tmp_path if place == "nvme" else None
    for result in ranks.run(2, measure_sharing, stage=3, place=place, directory=directory):
        assert result["pss_nbytes"] == 0
        assert any("base" in name for name in result["gathered"])


def test_writing_to_a_frozen_weight_writes_the_one_copy(ranks: RankPool):
    for result in ranks.run(3, overwrite_and_restore):
        assert result["seen"].unique().tolist() == [7.0]
        assert torch.equal(result["restored"], result["saved"])


@pytest.mark.parametrize(("place", "stage"), [("host", 3), ("host", 1), ("device", 3), ("device", 1)])
def test_loading_writes_the_one_copy_for_all(place, stage, ranks: RankPool):
    for result in ranks.run(2, load_and_read, place=place, stage=stage):
        assert same_bits(result["read"], result["loaded"])
        assert result["same_output"]
        assert result["dirtied_nbytes"] == 0


def test_only_the_rank_that_writes_them_draws_first_values(ranks: RankPool):
    (weights, num_filled), (others, num_filled_by_other) = ranks.run(2, read_first_values, share_frozen=True)
    expected, _ = ranks.run(2, read_first_values, share_frozen=False)[0]
    assert same_bits(weights, expected)
    assert same_bits(others, expected)
    assert num_filled_by_other < num_filled / 2


@pytest.mark.slow
def test_the_weights_outlive_the_rank_that_made_them():
    group = RankGroup(2, timeout_s=0.15 * PATIENCE_S)
    results = group.call(train_while_the_first_rank_dies, {})
    group.close()
    assert results[0].type_name == "Died"
    expected = case_of(MODEL).model().state_dict()[FROZEN]
    for result in results[1:]:
        assert "no response from rank 0, which has died or stalled" in result["message"]
        assert result["num_mapped"] == 1
        assert result["num_left"] == 0
        assert torch.equal(result["frozen"], expected)


@pytest.mark.slow
def test_each_machine_has_a_copy_of_its_own(ranks: RankPool):
    results = ranks.run(4, measure_on_machines, machines=["a", "b", "b", "a"])
    inodes = [result["inodes"] for result in results]
    assert inodes[0] == inodes[3] != inodes[1] == inodes[2]
    for here in ((0, 3), (1, 2)):
        pss_nbytes = sum(results[rank]["pss_nbytes"] for rank in here)
        assert results[0]["frozen_nbytes"] - 32 * KIB <= pss_nbytes <= results[0]["whole_nbytes"]
    for result in results:
        assert result["planned"][HOST]["shared weights"] == result["whole_nbytes"] / 2
        assert not any("base" in name for name in result["gathered"])


@pytest.mark.slow
def test_nobody_shares_if_a_rank_is_alone_on_its_machine(ranks: RankPool):
    for result in ranks.run(3, measure_on_machines, machines=["a", "a", "b"]):
        assert result["pss_nbytes"] == 0
        assert "shared weights" not in result["planned"][HOST]
        assert result["num_new_descriptors"] <= 0


def test_ranks_that_cannot_share_keep_shards(ranks: RankPool):
    for result in ranks.run(2, shard_with_a_hidden_file):
        assert result["pss_nbytes"] == 0
        assert "shared weights" not in result["planned"][HOST]
        assert any("base" in name for name in result["gathered"])
