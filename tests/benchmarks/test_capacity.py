"""The search for the largest model: what it plans, what it runs, what it reports."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # programs, not a package
import capacity  # noqa: E402
from capacity_run import Attempt, meta_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def attempt_with(swap: Path, **fields: object) -> Attempt:
    defaults = {"system": "gemini", "layers": 4, "tokens": 2, "dtype": "bf16", "ram_nbytes": 2 << 30}
    defaults |= {"base_nbytes": 450 << 20, "disk_nbytes": 1 << 30, "swap": str(swap)}
    return Attempt(**{**defaults, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [4, 7])
@pytest.mark.parametrize("tokens", [2, 128])
def test_a_shape_has_the_parameters_it_says(tmp_path: Path, layers: int, tokens: int) -> None:
    attempt = attempt_with(tmp_path, layers=layers, tokens=tokens)
    assert sum(param.numel() for param in meta_model(attempt).parameters()) == attempt.num_params


def test_plans_end_with_the_smallest_shape_that_the_disk_cannot_hold(tmp_path: Path) -> None:
    attempt = attempt_with(tmp_path, ram_nbytes=1 << 30)
    refused, (tried, second) = capacity.planned_attempts(attempt, range(24, 3, -1), 2)
    assert refused is not None
    assert refused["why"].startswith("nvme tier is short by ")
    assert (tried.layers, second.layers) == (refused["layers"] - 1, refused["layers"] - 2)
    both_nbytes = attempt.ram_nbytes + attempt.disk_nbytes
    assert tried.num_params * 12 < both_nbytes < refused["params"] * 14 + attempt.ram_nbytes


@pytest.mark.parametrize(
    ("start", "largest_ok", "expected"),
    [(3, 5, [3, 4, 5, 6]), (6, 5, [6, 5]), (5, 6, [5, 6, 7]), (4, 9, [4, 5, 6, 7]), (9, 3, [9, 8, 7, 6])],
)
def test_a_search_ends_between_what_does_and_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, largest_ok: int, expected: list[int]
) -> None:
    """Attempts 9 to 3, numbered by their layers; at most four of them."""
    monkeypatch.setattr(
        capacity, "run", lambda attempt, _: {"layers": attempt.layers, "ok": attempt.layers <= largest_ok}
    )
    attempts = [attempt_with(tmp_path, layers=layers) for layers in range(9, 2, -1)]
    rows = capacity.search(attempts, 9 - start, argparse.Namespace(attempts=4, timeout=1.0))
    assert [row["layers"] for row in rows] == expected


def imported_mib() -> int:
    """Return the memory that a process takes which has imported the libraries; builds of torch differ by a lot."""
    program = (
        "import torch, transformers.models.gpt2.modeling_gpt2, gemini.ddp; print(open('/proc/self/status').read())"
    )
    status = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


@pytest.mark.slow
def test_a_search_ends_with_three_steps_within_the_memory(tmp_path: Path) -> None:
    target, ram_mib = tmp_path / "capacity.json", imported_mib() + 415
    command = [
        sys.executable,
        BENCHMARKS / "capacity.py",
        "--ram",
        f"{ram_mib}MiB",
        "--max-layers",
        "4",
        "--tokens",
        "2",
    ]
    command += ["--systems", "gemini", "--swap", tmp_path, "--json", target]
    subprocess.run(command, check=True, capture_output=True)
    first, *missing = json.loads(target.read_text())["rows"]
    assert first["system"] == "gemini nvme"
    assert first["ok"] is True
    assert first["params"] == 4 * (12 * 320**2 + 13 * 320) + (50257 + 64 + 2) * 320
    assert 300 << 20 < first["peak_rss_bytes"] <= ram_mib << 20
    assert first["step_s"] > 0
    assert len(first["losses"]) == 3
    assert [row["missing"] for row in missing] == ["not asked for"] * 2
    assert not list(tmp_path.glob("capacity-swap-*"))
