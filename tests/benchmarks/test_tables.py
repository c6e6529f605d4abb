"""The tables of docs/performance.md are those of the newest result files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # programs, not a package
import tables  # noqa: E402

PAGE = "Before.\n<!-- results: adam -->\nstale\n<!-- end -->\nAfter.\n"


def write_result(directory: Path, name: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    environment = {
        "command": "python benchmarks/adam.py",
        "date": "2026-01-02T03:04:05+00:00",
        "processor": "a processor",
        "num_cpus": 2,
        "memory_nbytes": 24 << 30,
        "gpu": None,
        "torch": "2.13.0",
    }
    (directory / name).write_text(json.dumps({"environment": environment, **extra, "rows": rows}), encoding="utf-8")


def test_the_committed_page_is_what_the_result_files_say() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_table_says_where_it_comes_from_and_shows_large_units(tmp_path: Path) -> None:
    rows = [{"system": "gemini", "params": 1_500_000_000, "peak_rss_bytes": 4_000_000_000, "ok": True, "noise": [1, 2]}]
    write_result(tmp_path, "adam_cpu_2026-01-02.json", rows, columns=["system", "params", "peak_rss_bytes", "ok"])
    assert tables.rewrite(PAGE, tmp_path) == (
        "Before.\n<!-- results: adam -->\n"
        "`python benchmarks/adam.py`, 2026-01-02, a processor, 2 processors, 24 GiB, torch 2.13.0 "
        "([adam_cpu_2026-01-02.json](../benchmarks/results/adam_cpu_2026-01-02.json)):\n\n"
        "| system | params (10^9) | peak_rss_gb | ok |\n| --- | --- | --- | --- |\n| gemini | 1.5 | 4 | yes |\n"
        "<!-- end -->\nAfter.\n"
    )


def test_a_missing_system_ends_with_its_reason(tmp_path: Path) -> None:
    rows = [{"system": "gemini", "gb_per_s": 2.0}, {"system": "fio", "missing": "not installed"}]
    write_result(tmp_path, "adam_cpu_2026-01-02.json", rows, columns=["system", "gb_per_s"])
    assert "| fio |  | not installed |" in tables.rewrite(PAGE, tmp_path)


def test_a_page_that_has_its_tables_stays_as_it_is(tmp_path: Path) -> None:
    write_result(tmp_path, "adam_cpu_2026-01-02.json", [{"system": "gemini"}])
    once = tables.rewrite(PAGE, tmp_path)
    assert once != PAGE
    assert tables.rewrite(once, tmp_path) == once


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["adam_cpu_2026-01-02.json", "adam_cpu_2025-12-31.json"], "adam_cpu_2026-01-02.json"),
        (["adam_arm_2025-01-01.json", "adam_cpu_2026-01-02.json"], "adam_cpu_2026-01-02.json"),
        (["adam_kernels_cpu_2026-01-02.json", "loss_cpu_2026-01-02.json"], None),
    ],
)
def test_the_newest_file_of_a_name_counts(tmp_path: Path, names: list[str], expected: str | None) -> None:
    for name in names:
        write_result(tmp_path, name, [{"system": "gemini"}])
    found = tables.newest("adam", tmp_path)
    assert (found and found.name) == expected


def test_without_a_result_file_the_page_says_so(tmp_path: Path) -> None:
    assert "No result file for `adam` yet." in tables.rewrite(PAGE, tmp_path)
