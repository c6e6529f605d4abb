"""The search for the largest model: what it plans, what it runs, what it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
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


def test_the_first_attempt_is_the_smallest_shape_that_the_disk_cannot_hold(tmp_path: Path) -> None:
    shapes = list(range(24, 3, -1))
    ram_nbytes = 1 << 30
    (refused, reason), (tried, none) = islice(
        capacity.planned_attempts(attempt_with(tmp_path, ram_nbytes=ram_nbytes), shapes), 2
    )
    assert reason is not None
    assert reason.startswith("nvme tier is short by ")
    assert none is None
    assert tried.layers == refused.layers - 1
    assert tried.num_params * 12 < ram_nbytes + tried.disk_nbytes < refused.num_params * 14 + ram_nbytes


def test_the_first_attempt_of_a_peer_should_not_fit(tmp_path: Path) -> None:
    attempt = attempt_with(tmp_path, system="plain")
    tried = [each for each, _ in islice(capacity.peer_attempts(attempt, list(range(24, 3, -1))), 3)]
    room_nbytes = attempt.ram_nbytes - attempt.base_nbytes
    assert [each.num_params * 16 > room_nbytes for each in tried] == [True, False, False]
    assert tried[0].layers - 2 == tried[1].layers - 1 == tried[2].layers


@pytest.mark.slow
def test_a_search_ends_with_three_steps_within_the_memory(tmp_path: Path) -> None:
    target = tmp_path / "capacity.json"
    command = [sys.executable, BENCHMARKS / "capacity.py", "--ram", "800MiB", "--max-layers", "4", "--tokens", "2"]
    command += ["--systems", "gemini", "--swap", tmp_path, "--json", target]
    subprocess.run(command, check=True, capture_output=True)
    first, *missing = json.loads(target.read_text())["rows"]
    assert first["system"] == "gemini nvme"
    assert first["ok"] is True
    assert first["params"] == 4 * (12 * 320**2 + 13 * 320) + (50257 + 64 + 2) * 320
    assert 300 << 20 < first["peak_rss_bytes"] <= 800 << 20
    assert first["step_s"] > 0
    assert len(first["losses"]) == 3
    assert [row["missing"] for row in missing] == ["not asked for"] * 2
    assert not list(tmp_path.glob("capacity-swap-*"))
