"""The GPU benchmark as far as it runs without a GPU: what runs in which order, how rows are made, a tiny rehearsal."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_bandwidth
import gpu_systems


def options(*arguments: str) -> argparse.Namespace:
    return gpu.parse_arguments(["--device", "cpu", "--batch", "2", "--seq", "8", "--steps", "1", *arguments])


def child_options(system: str) -> argparse.Namespace:
    given = options()
    given.system, given.model, given.cap, given.slices = system, "tiny", 10**9, 1
    return given


def test_every_cap_compares_a_model_that_fits_and_trains_one_that_does_not() -> None:
    runs = gpu.plan_runs([10, 16, 24])
    for cap in (10, 16, 24):
        at_cap = [(run.task, run.system) for run in runs if run.cap_nbytes == cap * gpu.GB]
        assert {("fits", "torch-autocast"), ("fits", "gemini-host"), ("exceeds", "gemini-host")} <= set(at_cap)
        assert len(set(at_cap)) == len(at_cap)
    peers = [run for run in runs if run.system in ("deepspeed-host", "torchao-host")]
    assert {(run.task, run.cap_nbytes) for run in peers} == {("exceeds", 24 * gpu.GB)}
    assert [run.system for run in runs[-3:]] == ["torch-bf16", "gemini-stream", "gemini-auto"]
    assert {run.model for run in runs if run.task == "exceeds"} == {"llama-7b"}


def test_the_whole_run_ends_in_time() -> None:
    """A run gets no more than what is left, and none begins without a reasonable time."""
    given = options()
    assert given.time_limit < 9 * 60
    run = gpu.plan_runs([10])[0]
    row = gpu.train(run, given, left_s=5.0)
    assert row["missing"] == "no time was left, of 520 s"
    assert row["cap_gb"] == 10


def test_a_command_names_all_that_its_child_needs() -> None:
    run = gpu.plan_runs([24])[2]
    command = run.command(options("--swap", "/swap"))
    child = argparse.ArgumentParser()
    gpu_systems.add_options(child)
    for name in ("--system", "--model", "--cap", "--slices"):
        child.add_argument(name)
    parsed = child.parse_args(command[2:])
    assert (parsed.system, parsed.model, parsed.slices) == ("gemini-host", "llama-7b", "2")
    assert (parsed.batch, parsed.swap) == (2, Path("/swap"))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('RuntimeError: CUDA out of memory')", "RuntimeError: CUDA out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "killed, most likely for memory"),
        ("import time; time.sleep(60)", "not done after 2 s"),
    ],
)
def test_a_child_that_fails_says_why(code: str, reason: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        gpu.run_child([sys.executable, "-c", code], timeout_s=2.0)
    assert str(caught.value) == reason


def test_a_failed_run_is_a_missing_row_and_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], timeout_s: float) -> None:
        raise RuntimeError("No module named 'torchao'")

    monkeypatch.setattr(gpu, "run_child", fail)
    run = next(run for run in gpu.plan_runs([24]) if run.system == "torchao-host")
    row = gpu.train(run, options(), left_s=500.0)
    assert row == {
        "system": "torchao host",
        "task": "exceeds",
        "model": "llama-7b",
        "cap_gb": 24,
        "missing": "No module named 'torchao'",
    }
    assert gpu.measure_bandwidths(options(), 1.0)[0]["missing"] == "No module named 'torchao'"


def test_our_runs_are_compared_with_the_best_peer_of_the_same_model_and_cap() -> None:
    def row(task: str, system: str, cap: int, speed: float) -> gpu.Row:
        return {"task": task, "model": task, "cap_gb": cap, "system": gpu.NAMES[system], "tokens_per_s": speed}

    rows = [
        row("fits", "torch-autocast", 24, 100.0),
        row("fits", "torch-bf16", 24, 125.0),
        row("fits", "gemini-host", 24, 100.0),
        row("fits", "gemini-host", 10, 90.0),
        row("exceeds", "gemini-host", 24, 30.0),
        row("exceeds", "deepspeed-host", 24, 20.0),
        row("exceeds", "torchao-host", 24, 40.0),
        {"task": "h2d", "system": "ceiling", "gb_per_s": 55.0},
    ]
    gpu.compare(rows)
    assert [row.get("ratio") for row in rows] == [None, None, 0.8, None, 1.5, None, None, None]


def test_bandwidths_are_shares_of_the_ceiling_of_the_same_run() -> None:
    rows = gpu_bandwidth.measure(torch.device("cpu"), numel=8192, copy_nbytes=8192, num_repeats=2)
    ceilings = {row["task"]: row["gb_per_s"] for row in rows if row["system"] == "ceiling"}
    assert set(ceilings) == {"h2d", "d2h", "both", "device copy"}
    ours = [row for row in rows if row["system"].startswith("gemini")]
    assert {row["task"] for row in ours} >= {"h2d", "d2h", "both", "adam bf16", "adam bf16 in tiles"}
    for row in ours:
        assert row["ratio"] == row["gb_per_s"] / ceilings.get(row["task"], ceilings["device copy"])


@pytest.mark.parametrize("system", ["torch-autocast", "gemini-host", "gemini-stream"])
def test_a_run_measures_speed_and_memory(system: str) -> None:
    result = gpu_systems.measure(child_options(system))
    assert result["steps"] == 1
    assert result["tokens_per_s"] == 2 * 8 / result["step_s"]
    assert result["params"] == 98_624  # 2 blocks of 41,088, embedding and head of 8,192 each, a norm of 64
    assert json.loads(json.dumps(result)) == result
    if system == "gemini-host":
        assert result["resident_chunks"] == result["chunks"]
    if system == "gemini-stream":
        assert result["resident_chunks"] < result["chunks"]
        assert result["uploaded_bytes"] > 0


def test_without_a_gpu_the_benchmark_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        gpu.main()
