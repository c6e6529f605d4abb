"""The benchmark of many ranks: its formula, its comparisons, and a tiny run of our own stages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # programs, not a package

import zero_step  # noqa: E402


@pytest.mark.parametrize(
    ("stage", "num_ranks", "expected"),
    [(0, 1, 0), (3, 1, 0), (0, 2, 4000), (1, 2, 4000), (2, 4, 6000), (3, 2, 5200), (3, 4, 7800)],
)
def test_rings_take_what_the_formula_says(stage: int, num_ranks: int, expected: int) -> None:
    """1000 parameters of 4 bytes, 600 of them in blocks: 8000 bytes, in stage 3 and 2400 more, times (W - 1) / W."""
    nbytes = zero_step.ring_nbytes(stage=stage, num_ranks=num_ranks, params=1000, block_params=600)
    assert nbytes == expected


def row_of(system: str, step_s: float, losses: list[float]) -> dict[str, Any]:
    return {"ranks": 2, "system": system, "step_s": step_s, "losses": losses}


def test_times_are_compared_with_torch_of_as_many_ranks() -> None:
    rows = [row_of("torch ddp", 2.0, [1.0]), row_of("gemini stage 3", 3.0, [1.0])]
    rows += [{"ranks": 4, "system": "torch ddp", "missing": "no memory"}, {**rows[1], "ranks": 4}]
    zero_step.compare(rows)
    assert [row.get("ratio") for row in rows] == [1.0, 1.5, None, None]


@pytest.mark.parametrize(("loss", "agrees"), [(4.0001, True), (4.001, False)])
def test_a_system_that_trains_otherwise_is_said_to(loss: float, agrees: bool) -> None:
    rows = [row_of("torch ddp", 2.0, [5.0, 4.0]), row_of("torch fsdp2", 3.0, [5.0, loss])]
    zero_step.compare(rows)
    assert ("missing" not in rows[1]) is agrees


def test_a_run_that_fails_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], timeout_s: float) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(zero_step, "run_child", fail)
    options = argparse.Namespace(model="tiny", batch=1, seq=8, steps=1, timeout=PATIENCE_S)
    row = zero_step.run("torch", 2, options)
    assert row == {"system": "torch ddp", "ranks": 2, "missing": "no room"}


@pytest.mark.slow
def test_our_ranks_send_what_rings_send_and_keep_half() -> None:
    """Between gathering blocks once and twice; beside it padding, headers, norms and others who use the loopback."""
    options = argparse.Namespace(model="tiny", batch=1, seq=8, steps=3, timeout=PATIENCE_S)
    torch_row, row = (zero_step.run(system, 2, options) for system in ("torch", "gemini-3"))
    zero_step.compare([torch_row, row])
    assert "missing" not in row
    assert torch_row["ring_bytes"] < row["sent_bytes_min"] < 1.15 * row["ring_bytes"]
    assert row["state_bytes"] == pytest.approx(torch_row["state_bytes"] / 2, rel=0.25)
