"""The disk benchmark runs as a user runs it, in tiny form: a row for everybody in every mode, whoever is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

from gemini.offload.io import available_backends

REPOSITORY = Path(__file__).parents[2]
MODES = ["read", "write", "mixed"]


def run_benchmark(directory: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    disk = directory / "disk"
    disk.mkdir()
    command = [
        sys.executable, REPOSITORY / "benchmarks" / "io.py", "--dir", disk, "--nbytes", "256MiB", "--seconds", "0.1",
        "--passes", "2", "--json", directory / "io.json", *arguments,
    ]  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    finished = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=PATIENCE_S)
    assert finished.returncode == 0, finished.stderr
    assert list(disk.iterdir()) == []
    document: dict[str, Any] = json.loads((directory / "io.json").read_text())
    assert f"| {document['rows'][0]['system']} | " in finished.stdout
    return document


@pytest.mark.slow
def test_our_engines_have_a_row_for_every_mode(tmp_path: Path) -> None:
    document = run_benchmark(tmp_path, "--systems", "gemini")
    measured = [row for row in document["rows"] if "missing" not in row]
    assert [(row["mode"], row["engine"]) for row in measured] == [
        (mode, backend.value) for mode in MODES for backend in available_backends()
    ]
    for row in measured:
        assert 0 < row["gb_per_s_min"] <= row["gb_per_s"] <= row["gb_per_s_max"]
        assert row["cpu_s_per_gb"] > 0
        assert row["seconds"] >= 0.1
    assert document["environment"]["num_cpus"] >= 1
    assert document["settings"]["nbytes"] == 256 << 20


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_is_the_measure_where_it_is_installed(tmp_path: Path) -> None:
    rows = run_benchmark(tmp_path, "--systems", "gemini", "fio", "--passes", "1")["rows"]
    for mode in MODES:
        fio = [row for row in rows if row["system"] == "fio" and row["mode"] == mode]
        assert max(row["of_fio"] for row in fio) == 1.0
        best = max(row["gb_per_s"] for row in fio)
        ours = [row for row in rows if row["system"] == "gemini" and row["mode"] == mode and "missing" not in row]
        assert [row["of_fio"] for row in ours] == [row["gb_per_s"] / best for row in ours]


@pytest.mark.slow
def test_who_is_not_installed_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('nothing here')")
    (tmp_path / "bin").mkdir()
    search = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", "PATH": str(tmp_path / "bin")}
    rows = run_benchmark(tmp_path, "--systems", "fio", "deepspeed", **search)["rows"]
    missing = {(row["system"], row["engine"]): row["missing"] for row in rows}
    assert missing == {
        ("fio", "io_uring"): "fio is not installed",
        ("fio", "libaio"): "fio is not installed",
        ("fio", "psync"): "fio is not installed",
        ("deepspeed", "aio_handle"): "ImportError: nothing here",
    }
    assert sorted({row["mode"] for row in rows}) == sorted(MODES)
    assert len(rows) == 12
    assert not any("gb_per_s" in row for row in rows)
