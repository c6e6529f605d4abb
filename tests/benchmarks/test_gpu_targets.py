"""What rows say of the targets of a GPU: met, missed or not run, and why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # programs, not a package

from gpu_targets import ON_HOST, TARGETS, judge, target_table

TORCH, DEEPSPEED, ADAM, CAP, BITS, SETUP = range(6)


def trained(system: str = ON_HOST, task: str = "fits", cap: int = 24, **fields: Any) -> dict[str, Any]:
    return {"task": task, "model": "llama", "cap_gb": cap, "system": system, **fields}


def found(index: int, *rows: dict[str, Any]) -> tuple[str, str, str]:
    finding = judge(rows)[index][1]
    return finding.verdict, finding.found, finding.why


def test_without_rows_nothing_was_run() -> None:
    assert [finding.verdict for _, finding in judge([])] == ["not run"] * len(TARGETS)
    assert target_table([]).count("no such run") == len(TARGETS)


@pytest.mark.parametrize(("ratio", "verdict"), [(0.97, "met"), (0.9699, "missed")])
def test_the_goal_itself_is_met(ratio: float, verdict: str) -> None:
    assert found(TORCH, trained(of_torch=ratio), trained(cap=10, of_torch=0.5))[0] == verdict


def test_a_run_too_slow_to_be_measured_misses_what_its_bound_misses() -> None:
    """1.5 s against more than 2 s a step: below 0.75."""
    rows = [trained("torch autocast", step_s=1.5), trained(slower_than_s=2.0)]
    assert found(TORCH, *rows) == ("missed", "below 0.75 (fits)", "slower than 2 s a step")
    assert found(TORCH, trained("torch autocast", step_s=1.99), trained(slower_than_s=2.0))[0] == "not run"


def test_the_task_that_gains_least_decides() -> None:
    rows = [trained(of_deepspeed=3.0), trained(task="exceeds", of_deepspeed=1.9)]
    assert found(DEEPSPEED, *rows) == ("missed", "1.9 (exceeds, 24 GB)", "fits, 24 GB 3")


def test_a_peer_that_is_not_there_is_said_to_be_the_reason() -> None:
    reason = "ModuleNotFoundError: No module named 'deepspeed'"
    rows = [trained(tokens_per_s=9.0), trained("deepspeed zero-2 host", missing=reason)]
    assert found(DEEPSPEED, *rows) == ("not run", "", reason)


def test_the_slowest_format_of_our_own_kernels_decides() -> None:
    rows = [
        {"system": "gemini triton", "task": "adam bf16", "of_ceiling": 0.95},
        {"system": "gemini triton", "task": "adam bf16 in tiles", "of_ceiling": 0.85},
        {"system": "gemini torch", "task": "adam bf16", "of_ceiling": 0.1},
        {"system": "torch fused", "task": "adam fp32", "of_ceiling": 0.2},
    ]
    assert found(ADAM, *rows) == ("missed", "0.85 (adam bf16 in tiles)", "adam bf16 0.95")
    assert found(ADAM, {"system": "gemini", "task": "bandwidth", "missing": "broken"}) == ("not run", "", "broken")


@pytest.mark.parametrize(("peak", "verdict"), [(1000, "met"), (1001, "missed")])
def test_one_byte_above_the_budget_is_too_much(peak: int, verdict: str) -> None:
    other = trained(device_budget_bytes=1000, peak_device_bytes=900)
    assert found(CAP, other, trained(device_budget_bytes=1000, peak_device_bytes=peak))[0] == verdict


def test_where_no_device_memory_is_counted_nothing_is_said_of_it() -> None:
    assert found(CAP, trained(device_budget_bytes=1000, peak_device_bytes=0))[0] == "not run"


def test_all_placements_must_be_compared_and_equal() -> None:
    same = [{"task": "placement", "system": f"gemini, {name}", "same_bits": True} for name in "abc"]
    assert found(BITS, *same) == ("met", "3 of 3 placements", "")
    assert found(BITS, same[0])[0] == "not run"
    other = {"task": "placement", "system": "gemini, d", "same_bits": False}
    assert found(BITS, *same, other) == ("missed", "3 of 4 placements", "gemini, d")
    failed = {"task": "placement", "system": "gemini, e", "missing": "broken"}
    assert found(BITS, *same, failed) == ("missed", "3 of 4 placements", "gemini, e: broken")


def test_the_longest_set_up_of_the_large_model_decides() -> None:
    rows = [trained(task="exceeds", setup_s=50.0), trained(task="exceeds", cap=10, setup_s=61.0), trained(setup_s=99.0)]
    assert found(SETUP, *rows) == ("missed", "61.0 s", "llama")
    assert found(SETUP, trained(task="exceeds", missing="left out: 5 s were left"))[2] == "left out: 5 s were left"
