"""Ranks read and write weights by themselves, all of them alike, and see the bits that one process sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from access_cases import train_moving
from comparison import STAGES
from rank_pool import RankPool


@pytest.mark.quick_cases(6)
@STAGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "place"), [(2, "host"), (2, "nvme"), (2, "device"), (4, "mixed")])
def test_reads_and_writes_by_all_ranks_see_what_one_process_sees(
    world_size, place, dtype, stage, ranks: RankPool, tmp_path: Path
):
    (tmp_path / "alone").mkdir()
    right = train_moving(stage=None, place=place, directory=tmp_path / "alone", dtype=dtype)
    for found in ranks.run(world_size, train_moving, stage=stage, place=place, directory=tmp_path, dtype=dtype):
        for one, other in zip(found["seen"], right["seen"], strict=True):
            assert torch.equal(one, other)
        for name, value in right["masters"].items():
            assert torch.equal(found["masters"][name], value), name
