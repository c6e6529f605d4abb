"""Ranks share chunks of every dtype, and come to the bits of one process that is given the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparison import STAGES
from dtype_cases import train_mixed
from rank_pool import RankPool


@STAGES
@pytest.mark.parametrize("accumulation", [True, False])
@pytest.mark.parametrize("place", ["host", "nvme", "device"])
def test_weights_of_several_dtypes_train_as_in_one_process(place, accumulation, stage, ranks: RankPool, tmp_path: Path):
    fields = {"place": place, "gradient_accumulation": accumulation}
    (tmp_path / "alone").mkdir()
    right = train_mixed(stage=None, directory=tmp_path / "alone", **fields)
    for found in ranks.run(2, train_mixed, stage=stage, directory=tmp_path, **fields):
        for kind, weights in right.items():
            assert {name: value.dtype for name, value in found[kind].items()} == {
                name: value.dtype for name, value in weights.items()
            }
            for name, value in weights.items():
                assert torch.equal(found[kind][name].view(torch.uint8), value.view(torch.uint8)), name
    dtypes = {name: value.dtype for name, value in right["working"].items()}
    assert dtypes["small"] is torch.float8_e4m3fn
    assert dtypes["router.weight"] is torch.float32
    assert dtypes["shift"] is torch.bfloat16
