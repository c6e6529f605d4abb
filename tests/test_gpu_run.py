"""`make gpu`: what it decides, and that it ends as it should, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import importlib

    return importlib.import_module("gpu_run")


def test_without_a_gpu_it_says_so_in_one_sentence(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == "make gpu needs an NVIDIA GPU, and this machine has none"
    assert not (tmp_path / "out").exists()


def test_tests_leave_time_for_the_benchmark(program: ModuleType) -> None:
    assert program.time_for_tests(530.0, 60.0) == 240.0
    assert program.time_for_tests(530.0, 300.0) == 110.0
    assert program.time_for_tests(530.0, 500.0) == 0.0


def test_only_files_with_gpu_tests_are_run(program: ModuleType, tmp_path: Path) -> None:
    found = {Path(path).name for path in program.gpu_test_files(ROOT / "tests")}
    assert {"test_cuda.py", "test_device_adam.py", "test_group_of_one.py"} <= found
    (tmp_path / "test_a.py").write_text("@pytest.mark.gpu")
    (tmp_path / "test_b.py").write_text("@pytest.mark.slow")
    assert [Path(path).name for path in program.gpu_test_files(tmp_path)] == ["test_a.py"]


def test_only_what_is_missing_is_installed(program: ModuleType) -> None:
    wheels = [Path("w/pytest_timeout-2.4.0-py3-none-any.whl"), Path("w/cffi-2.1.1-cp312-cp312-linux_x86_64.whl")]
    assert program.wheels_to_install(wheels, ["torch", "Pytest-Timeout"]) == [wheels[1]]
    assert program.wheels_to_install(wheels, []) == [wheels[1], wheels[0]]


def test_the_native_module_is_built_if_it_is_missing_or_old(program: ModuleType, tmp_path: Path) -> None:
    built, sources = tmp_path / "built", [tmp_path / "one", tmp_path / "two"]
    for index, source in enumerate(sources):
        source.touch()
        os.utime(source, (100 + index, 100 + index))
    assert program.is_stale(built, sources)
    built.touch()
    os.utime(built, (101, 101))
    assert not program.is_stale(built, sources)
    os.utime(sources[1], (102, 102))
    assert program.is_stale(built, sources)


def test_wheels_are_fetched_at_the_tested_versions_and_without_torch(program: ModuleType) -> None:
    (command,) = program.download_commands(Path("w"), "3.12", ["tokenizers==0.22"], with_peers=False)
    pins = dict(line.split("==") for line in command if "==" in line)
    assert pins["tokenizers"] == "0.22"
    assert {"cffi", "psutil", "rich", "pytest"} <= pins.keys()
    assert not any(word.startswith("torch") for word in command)
    assert "--no-deps" in command
    with_peers = program.download_commands(Path("w"), "3.12", [], with_peers=True)
    assert "torchao" in with_peers[0]
    assert with_peers[1][-1] == "deepspeed"


@pytest.mark.parametrize(("statuses", "status"), [((0, 0), 0), ((1, 0), 1), (("ended after 240 s", 0), 1), ((0, 1), 1)])
def test_a_failed_test_ends_neither_the_benchmark_nor_in_success(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    statuses: tuple[int | str, int],
    status: int,
) -> None:
    started: list[tuple[list[str], str]] = []

    def run_logged(command: list[str], log: Path, longest_s: float) -> int | str:
        started.append((command, log.name))
        return statuses[len(started) - 1]

    monkeypatch.setattr(program, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(program, "choose_python", lambda wanted: "python")
    monkeypatch.setattr(program, "prepare", lambda python, wheels: None)
    monkeypatch.setattr(program, "run_logged", run_logged)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path)])
    assert program.main() == status
    (tests, tests_log), (benchmark, benchmark_log) = started
    assert tests[:3] == ["python", "-m", "pytest"]
    assert benchmark[:4] == ["python", "benchmarks/gpu.py", "--out", str(tmp_path)]
    assert 100 < float(benchmark[-1]) < 530
    assert (tests_log, benchmark_log) == ("gpu-tests.txt", "gpu-benchmark.txt")


@pytest.mark.processes
def test_what_a_command_prints_is_shown_and_kept(
    program: ModuleType, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = [sys.executable, "-c", "import sys; print('out'); sys.stdout.flush(); sys.exit('err')"]
    assert program.run_logged(command, tmp_path / "log", 60.0) == 1
    assert (tmp_path / "log").read_bytes() == b"out\nerr\n"
    assert capfdbinary.readouterr().out == b"out\nerr\n"


@pytest.mark.processes
def test_a_command_that_takes_too_long_is_ended(program: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert program.run_logged(command, tmp_path / "log", 0.0) == "ended after 0 s"


def test_what_is_missing_is_named_with_the_remedy(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "SITE", tmp_path / "site")
    monkeypatch.setattr(program, "NEEDED", ("json", "not_there"))
    with pytest.raises(SystemExit, match=r"lacks not_there in .*make gpu-wheels.*make gpu WHEELS=DIR"):
        program.prepare(sys.executable, None)


def test_make_calls_it_with_what_it_was_given() -> None:
    shown = subprocess.run(
        ["make", "-n", "gpu", "WHEELS=w", "OUT=o", "PYTHON=p"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "p .ci/gpu_run.py --out o --wheels w --python p"
