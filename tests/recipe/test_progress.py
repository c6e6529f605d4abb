"""What the line and the log say of a run's pace."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from gemini.recipe import progress as module
from gemini.recipe.progress import ProgressCallback, Snapshot, Utilization, pace_between


def snapshot(**fields: Any) -> Snapshot:
    counters: dict[str, Any] = dict.fromkeys(("seconds", "stall_s"), 0.0)
    counters |= dict.fromkeys(("steps", "tokens", "padded_tokens"), 0)
    counters |= dict.fromkeys(("fetched_nbytes", "nvme_read_nbytes", "nvme_written_nbytes"), 0)
    return Snapshot(**{**counters, "tiers": {}, **fields})


def test_a_pace_is_what_grew_over_the_time() -> None:
    after = snapshot(seconds=4.0, steps=2, tokens=100, padded_tokens=160, stall_s=1.0, nvme_read_nbytes=8_000_000_000)
    pace = pace_between(snapshot(), after)
    assert (pace.seconds, pace.tokens_per_s, pace.padded_tokens_per_s) == (2.0, 25.0, 40.0)
    assert (pace.stall_share, pace.nvme_read_gb_per_s, pace.mfu) == (0.25, 2.0, None)


def test_mfu_is_the_models_operations_over_those_at_the_peak() -> None:
    """40 tokens a second of 6 billion operations each are 0.24 of 10^12 operations a second."""
    utilization = Utilization(flops_per_token=6e9, peak_flops_per_s=1e12)
    after = snapshot(seconds=4.0, steps=2, tokens=100, padded_tokens=160)
    assert pace_between(snapshot(), after, utilization).mfu == pytest.approx(0.24)


def test_a_pause_is_left_out_of_everything() -> None:
    before, begin = snapshot(seconds=10.0, stall_s=1.0), snapshot(seconds=20.0, stall_s=2.0)
    moved = before.after_pause(begin, snapshot(seconds=27.0, stall_s=2.5, tiers={"host": 3}))
    assert moved == snapshot(seconds=17.0, stall_s=1.5)


class Run:
    """Steps of a trainer, of a second each, on a clock of their own."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, *, first: int = 0) -> None:
        self.now_s = 0.0
        self.state = SimpleNamespace(global_step=first, max_steps=100)
        self.callback = ProgressCallback(path, Console(quiet=True), Utilization(flops_per_token=1, peak_flops_per_s=10))
        report = SimpleNamespace(
            fetch_stall_s=0.0, update_stall_s=0.0, fetched_nbytes=0, nvme_read_nbytes=0, nvme_written_nbytes=0, tiers=()
        )
        engine: Any = SimpleNamespace(memory_report=lambda: report)
        self.callback.follow(engine, None)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now_s)
        self.tell("on_train_begin")

    def tell(self, event: str, **kwargs: Any) -> None:
        flags = {"should_evaluate": False, "should_save": False} | kwargs.pop("control", {})
        getattr(self.callback, event)(None, self.state, SimpleNamespace(**flags), **kwargs)

    def step(self, *, evaluation_s: float = 0.0) -> None:
        self.state.global_step += 1
        self.now_s += 1.0
        self.callback.count({"input_ids": torch.zeros(1, 5)})
        self.tell("on_step_end", control={"should_evaluate": evaluation_s > 0, "should_save": evaluation_s > 0})
        self.tell("on_log", logs={"loss": 2.0})
        if evaluation_s:
            self.now_s += evaluation_s
            self.tell("on_log", logs={"eval_loss": 3.0})
            self.tell("on_evaluate")
            self.now_s += evaluation_s
            self.tell("on_save")


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_evaluating_and_saving_do_not_slow_training_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "log.csv", monkeypatch)
    for evaluation_s in (0.0, 30.0, 0.0):
        run.step(evaluation_s=evaluation_s)
    rows = rows_of(tmp_path / "log.csv")
    assert [row["seconds"] for row in rows] == ["1.0", "1.0", "", "1.0"]
    assert [row["mfu"] for row in rows] == ["0.5", "0.5", "", "0.5"]
    assert rows[2]["eval_loss"] == "3.0"


def test_a_resumed_run_replaces_the_rows_behind_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    first = Run(path, monkeypatch)
    for _ in range(5):
        first.step()
    resumed = Run(path, monkeypatch, first=3)
    resumed.step()
    assert [row["step"] for row in rows_of(path)] == ["1", "2", "3", "4"]


def test_a_new_run_has_a_new_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    path.write_text("whatever, was\nhere, before\n")
    Run(path, monkeypatch).step()
    assert [row["step"] for row in rows_of(path)] == ["1"]
