"""The report: what the disk was asked for, to the byte, what that takes of its life, and when updates ran."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clock import FakeClock
from patience import PATIENCE_S, wait_until
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement
from gemini.observe.report import DiskWear, UpdateReport, wear_of
from gemini.offload.io import IoStats
from gemini.tiers import round_up
from gemini.update import overlap_choice, worker
from gemini.update.job import UpdateJob
from gemini.update.pipeline import TilePipeline

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
            assert engine.runtime.steps.num_skipped_steps == 0
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


def test_the_report_tells_which_updates_ran_ahead_and_which_were_redone(tmp_path: Path) -> None:
    config = make_config(tmp_path, overlap="speculative", placement=StaticPlacement(param_nvme=1, state_nvme=1))
    with GeminiDDP(make_model(), config) as engine:
        before = engine.memory_report().updates
        optimizer = HybridAdam(engine.parameters(), lr=1e-3)
        for _ in range(3):
            train_step(engine, optimizer)
        engine(torch.ones(2, WIDTH)).square().mean().backward()
        engine.clip_grad_norm_(1e-3)
        optimizer.step()
        report = engine.memory_report()
    assert before == UpdateReport(
        overlap_asked="speculative",
        overlap="next-forward",  # until a step has shown how many backward passes make one
        why_not_asked="no step has been taken",
        num_updates=0,
        num_ahead=0,
        num_redone=0,
        busy_s=None,
        step_s=None,
    )
    found = report.updates
    assert (found.overlap_asked, found.overlap, found.why_not_asked) == ("speculative", "speculative", None)
    assert "(requested: speculative, but no step has been taken)" in str(before)
    assert (found.num_updates, found.num_ahead, found.num_redone) == (4 * NUM_CHUNKS, 3 * NUM_CHUNKS, NUM_CHUNKS)
    assert json.loads(report.to_json())["updates"] == dataclasses.asdict(found)
    assert (
        "\nupdates: overlap speculative (requested: speculative); 12 updates of chunks, 9 started ahead of the step, "
        f"3 of them redone; thread busy {found.busy_s:.3f} s of the last step's {found.step_s:.3f} s\n"
    ) in str(report)


def test_a_mode_that_was_chosen_is_told_from_one_that_was_asked_for() -> None:
    with GeminiDDP(make_model(), GeminiConfig(device="cpu", dtype=torch.float32, host_budget="64MiB")) as engine:
        report = engine.memory_report()
    assert (report.updates.overlap_asked, report.updates.overlap) == ("auto", "off")
    assert "overlap off (requested: auto); 0 updates of chunks" in str(report)
    assert "thread busy" not in str(report)


def test_the_update_thread_is_busy_while_it_works_whether_anybody_waits_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, clock, has_ended = TilePipeline.start, FakeClock(), threading.Event()
    clock.set_in(monkeypatch, worker, overlap_choice)

    def slow_start(self: TilePipeline, job: UpdateJob, index: int) -> None:
        assert has_ended.wait(PATIENCE_S)  # no tile of the first step counts for it
        clock.sleep(0.02)
        start(self, job, index)

    monkeypatch.setattr(TilePipeline, "start", slow_start)
    num_tiles = 3 * NUM_CHUNKS
    with GeminiDDP(make_model(), make_config(tmp_path, overlap="next-forward")) as engine:
        optimizer = HybridAdam(engine.parameters())
        train_step(engine, optimizer)
        assert engine.memory_report().updates.busy_s is None
        has_ended.set()
        updater = engine.runtime.updates._worker
        wait_until(lambda: updater.is_idle and updater.busy_s > 0.02 * (num_tiles - 0.5))
        clock.sleep(1)  # after the updates
        train_step(engine, optimizer)
        updates = engine.memory_report().updates
    assert updates.busy_s is not None
    assert updates.step_s is not None
    straddling = 0.02  # a tile that began in the step before is busy in this one
    assert num_tiles * 0.02 <= updates.busy_s + 1e-6 <= updates.step_s - 1 + straddling + 2e-6
