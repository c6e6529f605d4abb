"""Benchmarks that no other test runs, in miniature: they run to the end and write what their tables need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRIALS = {
    "recording.py": ["--layers", "1", "--width", "64", "--rounds", "1"],
    "construction.py": ["--layers", "1", "--hidden", "128", "--rounds", "1", "--device", "cpu"],
    "heap.py": ["--model", "tiny", "--tokens", "32", "--steps", "1", "--rounds", "1", "--systems", "torch", "gemini"],
}
WITHOUT_DISK = {"construction.py"}


@pytest.mark.slow
@pytest.mark.parametrize("script", TRIALS)
def test_a_trial_run_writes_its_rows(script: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    swap = [] if script in WITHOUT_DISK else ["--swap", tmp_path]
    command = [sys.executable, BENCHMARKS / script, *TRIALS[script], *swap, "--json", result]
    subprocess.run(command, check=True, timeout=300)
    rows = json.loads(result.read_text())["rows"]
    assert rows
    assert not [row for row in rows if row.get("missing")]
