"""The report: what the disk was asked for, to the byte, and what that takes of its life."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement
from gemini.offload.io import IoStats
from gemini.report import DiskWear, wear_of
from gemini.tiers import round_up

TILE_NUMEL = 4096
WIDTH = 96
CHUNK_NUMEL = WIDTH * WIDTH + WIDTH
NUM_CHUNKS = 3
STEPS_BEFORE = 2
"""Steps until the order is known and, in the overlapping modes, updates run beside the passes."""


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_CHUNKS)))


def make_config(directory: Path, *, endurance: str | int | None = None, **fields: Any) -> GeminiConfig:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": torch.float32,
        "host_budget": "64MiB",
        "nvme": NVMeConfig(path=directory, budget="16MiB", endurance=endurance),
        "placement": StaticPlacement(state_nvme=1),
        "tile_numel": TILE_NUMEL,
        "min_unit_nbytes": 0,
        "num_threads": 2,
    }
    return GeminiConfig(**{**defaults, **fields})


def train_step(engine: GeminiDDP, optimizer: HybridAdam) -> None:
    engine(torch.ones(2, WIDTH, dtype=engine.runtime.config.dtype)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def traffic(engine: GeminiDDP) -> IoStats:
    engine.runtime.finish_updates()
    assert engine.runtime.resources.store is not None
    return engine.runtime.resources.store.stats()


def state_nbytes(master_itemsize: int) -> int:
    """Bytes of all state records: tiles of 4096, 4096 and 1120 elements, each part padded to 4096 bytes."""
    tiles = (4096, 4096, 1120)
    assert sum(tiles) == CHUNK_NUMEL
    return NUM_CHUNKS * sum(round_up(n * master_itemsize, 4096) + 2 * round_up(n * 4, 4096) for n in tiles)


@pytest.mark.parametrize("overlap", ["off", "next-forward", "speculative"])
@pytest.mark.parametrize(("dtype", "master_itemsize"), [(torch.float32, 0), (torch.bfloat16, 2), (torch.float16, 4)])
def test_a_step_reads_the_state_once_and_writes_it_once(
    overlap: str, dtype: torch.dtype, master_itemsize: int, tmp_path: Path
) -> None:
    config = make_config(tmp_path, overlap=overlap, dtype=dtype)
    with GeminiDDP(make_model(), config) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-3)
        for _ in range(STEPS_BEFORE):
            train_step(engine, optimizer)
        for _ in range(2):
            before = traffic(engine)
            train_step(engine, optimizer)
            assert engine.runtime.num_skipped_steps == 0
            nbytes = state_nbytes(master_itemsize)
            assert traffic(engine) - before == IoStats(nbytes_read=nbytes, nbytes_written=nbytes)


def test_the_report_counts_the_disk_from_the_first_weights_on(tmp_path: Path) -> None:
    nbytes, header_nbytes = state_nbytes(0), 4096
    with GeminiDDP(make_model(), make_config(tmp_path, endurance=1000 * nbytes)) as engine:
        report = engine.memory_report()
        assert (report.nvme_read_nbytes, report.nvme_written_nbytes) == (0, nbytes + header_nbytes)
        assert report.nvme_written_nbytes_per_step is report.wear is None
        optimizer = HybridAdam(engine.parameters(), lr=1e-3)
        for _ in range(3):
            train_step(engine, optimizer)
        engine.runtime.finish_updates()
        report = engine.memory_report()
    assert (report.nvme_read_nbytes, report.nvme_written_nbytes) == (3 * nbytes, 4 * nbytes + header_nbytes)
    assert (report.nvme_read_nbytes_per_step, report.nvme_written_nbytes_per_step) == (nbytes, nbytes)
    assert report.wear == DiskWear(endurance_nbytes=1000 * nbytes, life_share_per_step=0.001, num_steps_of_life=1000)
    assert "0.001 of the drive's rated life (1,000 steps)" in str(report)
    assert json.loads(report.to_json())["wear"]["num_steps_of_life"] == 1000


def test_without_a_rated_endurance_the_report_speaks_of_bytes_only(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), make_config(tmp_path)) as engine:
        train_step(engine, HybridAdam(engine.parameters()))
        report = engine.memory_report()
    assert report.wear is None
    assert "a step reads" in str(report)
    assert "life" not in str(report)


def test_without_a_disk_the_report_has_no_disk_line() -> None:
    config = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="64MiB")
    with GeminiDDP(make_model(), config) as engine:
        train_step(engine, HybridAdam(engine.parameters()))
        report = engine.memory_report()
    assert (report.nvme_read_nbytes, report.nvme_written_nbytes_per_step, report.wear) == (0, 0.0, None)
    assert "disk:" not in str(report)


def test_a_drive_of_600_terabytes_lasts_as_its_data_sheet_says(tmp_path: Path) -> None:
    config = NVMeConfig(path=tmp_path, budget="1GiB", endurance="600TB")
    assert config.endurance_nbytes == 600 * 10**12
    wear = wear_of(600 * 10**12, written_nbytes_per_step=24e9)
    assert wear.num_steps_of_life == 25_000
    assert wear.life_share_per_step == pytest.approx(4e-5)


def test_a_step_that_writes_nothing_wears_nothing() -> None:
    assert wear_of(10**12, written_nbytes_per_step=0) == DiskWear(
        endurance_nbytes=10**12, life_share_per_step=0.0, num_steps_of_life=None
    )
