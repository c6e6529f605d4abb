"""What repeats tests: it finds failures by name, and leaves no load behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from patience import wait_until

sys.path.insert(0, str(Path(__file__).parent))  # a program, not a package

import stress

STRESS = Path(stress.__file__)
TESTS = """
import pathlib, pytest
pytestmark = pytest.mark.processes
def test_passes(): pass
def test_fails_now_and_then():
    seen = pathlib.Path(__file__).with_name("seen")
    seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
    assert len(seen.read_text()) % 2 == 0
"""


@pytest.fixture
def some_tests(tmp_path: Path) -> Path:
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    return path


@pytest.mark.slow
def test_what_fails_is_named_with_its_rounds(some_tests: Path) -> None:
    command = [sys.executable, str(STRESS), "--rounds", "3", "--kinds", "plain", "--", str(some_tests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "plain          3       1       2\n" in done.stdout
    assert "test_fails_now_and_then failed in 2 of 3 rounds" in done.stdout
    assert "test_passes failed" not in done.stdout


def test_no_tests_are_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "test_none.py"
    path.write_text("def test_of_no_process(): pass\n")
    _, failed, _ = stress.run_round("plain", [str(path)])
    assert failed == ["pytest itself (exit code 5)"]


def test_a_pinned_round_has_one_processor(tmp_path: Path) -> None:
    path = tmp_path / "test_one.py"
    path.write_text(
        "import os, pytest\npytestmark = pytest.mark.processes\n"
        "def test_one(): assert len(os.sched_getaffinity(0)) == 1\n"
    )
    assert stress.run_round("pinned", [str(path)])[1] == []


def load_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "while True: pass" in child.cmdline()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_load_ends_with_who_started_it(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "test_waits.py"
    path.write_text("import sys, time, pytest\n@pytest.mark.processes\ndef test_waits(): time.sleep(1000)\n")
    command = [sys.executable, str(STRESS), "--rounds", "1", "--kinds", "loaded", "--", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as program:
        num_busy = 2 * (os.cpu_count() or 1)
        wait_until(lambda: len(load_of(program.pid)) == num_busy)
        load = load_of(program.pid)
        try:
            program.send_signal(number)
            wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in load))
        finally:
            os.killpg(program.pid, signal.SIGKILL)
