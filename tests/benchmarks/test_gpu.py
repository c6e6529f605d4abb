"""The GPU benchmark as far as it runs without a GPU: what runs in which order, how rows are made, a tiny rehearsal."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from fake_clock import FakeClock
from patience import PATIENCE_S, wait_until

pytest.importorskip("transformers")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # programs, not a package

import gpu  # noqa: E402
import gpu_bandwidth  # noqa: E402
import gpu_systems  # noqa: E402
import tables  # noqa: E402
from children import ChildError, Said, follow_child, run_child  # noqa: E402


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
    peers = {(run.task, run.system, run.cap_nbytes // gpu.GB) for run in runs if run.system[0] in "dt"} - {
        ("fits", "torch-autocast", cap) for cap in (10, 16, 24)
    }
    assert peers == {(task, system, 24) for task, system in (*gpu.PEERS, ("fits", "torch-bf16"))}
    assert {run.model for run in runs if run.task == "exceeds"} == {"llama-7b"}


def test_what_matters_most_is_run_first() -> None:
    caps = [run.cap_nbytes // gpu.GB for run in gpu.plan_runs([10, 16, 24])]
    assert caps == [24] * 6 + [10] * 3 + [16] * 3 + [24] * 3
    assert [run.system for run in gpu.plan_runs([16])[-3:]] == ["torch-bf16", "gemini-stream", "gemini-auto"]
    assert [case.name for case in gpu.plan_cases(options())[:2]] == ["bandwidth", "placement"]


def made_up_case(name: str, clock: FakeClock, *, needed_s: float, takes_s: float) -> gpu.Case:
    def measure(left_s: float) -> Iterator[gpu.Row]:
        clock.now_s += min(takes_s, left_s)
        yield {"case": name}

    return gpu.Case(name, needed_s, measure, lambda why: {"case": name, "missing": why})


def test_cases_are_begun_as_long_as_there_is_time_for_them() -> None:
    """One is left out by name where too little is left; a shorter one behind it is still run."""
    clock = FakeClock()
    cases = [
        made_up_case("long", clock, needed_s=50, takes_s=70),
        made_up_case("too long", clock, needed_s=31, takes_s=1),
        made_up_case("short", clock, needed_s=30, takes_s=25),
        made_up_case("late", clock, needed_s=6, takes_s=1),
    ]
    assert list(gpu.measure_all(cases, 100.0, lambda: clock.now_s)) == [
        {"case": "long"},
        {"case": "too long", "missing": "left out: 30 s were left of 100, and it may take 31"},
        {"case": "short"},
        {"case": "late", "missing": "left out: 5 s were left of 100, and it may take 6"},
    ]


def said(*stages: tuple[float, str]) -> list[Said]:
    return [Said(at_s, {"stage": stage}) for at_s, stage in stages]


def test_only_training_has_a_limit_of_its_own() -> None:
    def end_of(*stages: tuple[float, str]) -> float:
        return gpu.end_of(said(*stages), longest_s=45.0, left_s=300.0)

    assert end_of() == 300.0
    assert end_of((200.0, "ready")) == 245.0
    assert end_of((200.0, "ready"), (210.0, "step"), (230.0, "step")) == 245.0
    assert end_of((280.0, "ready")) == 300.0
    assert end_of((200.0, "ready"), (210.0, "step"), (211.0, "trained")) == 300.0


def test_a_run_that_is_ended_is_slower_than_a_step_time_and_not_missing() -> None:
    ready = Said(60.0, {"stage": "ready", "setup_s": 40.0})
    steps = [Said(80.0, {"stage": "step", "s": 20.0}), Said(100.0, {"stage": "step", "s": 20.0})]
    row = gpu.unfinished([ready, *steps], 150.0, "not done after 150 s")
    assert row == {"setup_s": 40.0, "slower_than_s": 30.0, "steps": 2}
    assert gpu.outcome_of(row) == "slower than 30 s a step"
    assert gpu.unfinished([ready], 150.0, "not done after 150 s")["slower_than_s"] == 90.0
    assert "slower_than_s" not in gpu.unfinished([ready, *steps], None, "RuntimeError: broken")
    assert gpu.unfinished([], 150.0, "not done after 150 s") == {
        "missing": "not set up after 150 s, when the time for everything was over"
    }


def test_a_command_names_all_that_its_child_needs() -> None:
    run = gpu.plan_runs([24])[2]
    command = run.command(options("--swap", "/swap", "--host-budget", "100GiB"))
    child = argparse.ArgumentParser()
    gpu_systems.add_options(child)
    for name in ("--system", "--model", "--cap", "--slices"):
        child.add_argument(name)
    parsed = child.parse_args(command[2:])
    assert (parsed.system, parsed.model, parsed.slices) == ("gemini-host", "llama-7b", "2")
    assert (parsed.batch, parsed.swap, parsed.host_budget) == (2, Path("/swap"), "100GiB")
    assert "--host-budget" not in run.command(options())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('RuntimeError: CUDA out of memory')", "RuntimeError: CUDA out of memory"),
        (
            "import atexit, sys; atexit.register(sys.stderr.write, '[rank0]: W: not destroyed'); import nothing_",
            "ModuleNotFoundError: No module named 'nothing_'",
        ),
        ("print('done')", "ended without a result"),
        ("import os; os.kill(os.getpid(), 9)", "killed, most likely for memory"),
    ],
)
def test_a_child_that_fails_says_why(code: str, reason: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_child([sys.executable, "-c", code], timeout_s=PATIENCE_S)
    assert str(caught.value) == reason
    if reason != "ended without a result":
        with pytest.raises(ChildError, match=f"^{re.escape(reason)}$"):
            list(follow_child([sys.executable, "-c", code], lambda said: PATIENCE_S))


@pytest.mark.processes
def test_what_a_child_says_is_known_at_once_and_moves_its_end(tmp_path: Path) -> None:
    """The child goes on when what it said was heard; it is then ended at once."""
    heard = tmp_path / "heard"
    code = f"""
import os, time
print('no json'); print('{{"stage": "ready"}}', flush=True)
while not os.path.exists({str(heard)!r}): time.sleep(0.01)
print('{{"stage": "step"}}', flush=True)
time.sleep(1000)
"""
    child = follow_child([sys.executable, "-c", code], lambda said: PATIENCE_S if len(said) < 2 else 0.0)
    assert next(child).value == {"stage": "ready"}
    heard.touch()
    assert next(child).value == {"stage": "step"}
    with pytest.raises(ChildError, match="^not done after 0 s$") as caught:
        next(child)
    assert [each.value["stage"] for each in caught.value.said] == ["ready", "step"]
    assert caught.value.ended_s == 0.0


@pytest.mark.processes
def test_nothing_that_a_child_started_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up after a while; here, when it has started what is to end with it."""
    note = tmp_path / "pid"
    code = f"""
import os, subprocess
child = subprocess.Popen(['sleep', '1000'])
open({str(note)!r} + 'new', 'w').write(str(child.pid))
os.rename({str(note)!r} + 'new', {str(note)!r})
child.wait()
"""
    communicate = subprocess.Popen.communicate

    def give_up(process: subprocess.Popen[str], timeout: float) -> tuple[str, str]:
        assert timeout == 7.0
        wait_until(note.exists)
        return communicate(process, timeout=0.001)

    monkeypatch.setattr(subprocess.Popen, "communicate", give_up)
    with pytest.raises(RuntimeError, match="^not done after 7 s$"):
        run_child([sys.executable, "-c", code], timeout_s=7.0)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(note.read_text())).wait(PATIENCE_S)


def test_what_a_library_prints_is_not_a_result() -> None:
    code = """print('{"step_s": 1.5}'); print('[2026-01-02 03:04:05] [INFO] done')"""
    assert run_child([sys.executable, "-c", code], timeout_s=PATIENCE_S) == {"step_s": 1.5}


def test_a_failed_run_is_a_missing_row_and_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], deadline_of: object) -> Iterator[Said]:
        raise ChildError("No module named 'torchao'", [])
        yield

    monkeypatch.setattr(gpu, "follow_child", fail)
    run = next(run for run in gpu.plan_runs([24]) if run.system == "torchao-host")
    row = gpu.train(run, options(), left_s=500.0)
    assert row == {
        "system": "torchao host",
        "task": "exceeds",
        "model": "llama-7b",
        "cap_gb": 24,
        "missing": "No module named 'torchao'",
    }
    assert next(gpu.plan_cases(options())[0].measure(1.0))["missing"] == "No module named 'torchao'"


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
        row("fits", "deepspeed-host", 24, 50.0),
        {"task": "h2d", "system": "ceiling", "gb_per_s": 55.0},
    ]
    gpu.compare(rows)
    assert [row.get("of_torch") for row in rows] == [None, None, 0.8, *[None] * 6]
    assert [row.get("of_deepspeed") for row in rows] == [None, None, 2.0, None, 1.5, *[None] * 4]


def test_bandwidths_are_shares_of_the_ceiling_of_the_same_run() -> None:
    rows = gpu_bandwidth.measure(torch.device("cpu"), numel=8192, copy_nbytes=8192, num_repeats=2)
    ceilings = {row["task"]: row["gb_per_s"] for row in rows if row["system"] == "ceiling"}
    assert set(ceilings) == {"h2d", "d2h", "both", "device copy"}
    compared = [row for row in rows if row["system"] != "ceiling"]
    ours = [row["task"] for row in compared if row["system"].startswith("gemini")]
    assert {"h2d", "d2h", "both", "adam bf16", "adam bf16 in tiles", "gradient bf16 to fp32"} <= set(ours)
    for row in compared:
        assert row["of_ceiling"] == row["gb_per_s"] / ceilings.get(row["task"], ceilings["device copy"])


@pytest.mark.slow
def test_the_triton_kernels_are_measured_as_the_benchmark_measures_them() -> None:
    """In Triton's interpreter, which must be chosen before torch and Triton are loaded: in a process of its own."""
    pytest.importorskip("triton")
    code = """
import json, sys
sys.path.insert(0, "benchmarks")
import torch, gpu_bandwidth
from gemini.kernels.device import _triton_kernels
cpu = torch.device("cpu")
print(json.dumps(gpu_bandwidth.measure_kernels(cpu, _triton_kernels(cpu), numel=4096, num_repeats=1)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS.parent)},
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    formats = ["adam bf16", "adam fp16", "adam fp32", "adam bf16 in tiles", "gradient bf16 to fp32"]
    assert [(row["system"], row["task"]) for row in rows] == [("gemini triton", task) for task in formats]
    assert all(row["gb_per_s"] > 0 for row in rows)


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_runs_everything_from_end_to_end(tmp_path: Path) -> None:
    """Real children: a row for each case, each written at once, and last of all the table of the targets."""
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--batch", "2", "--seq", "8", "--steps", "1"]
    command += ["--caps", "10", "--time-limit", "800", "--out", tmp_path]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (path,) = tmp_path.glob("gpu-rehearsal_cpu_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert not [row for row in rows if "missing" in row or "slower_than_s" in row]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()][1:]
    assert [(line["task"], line["system"]) for line in lines] == [(row["task"], row["system"]) for row in rows]
    assert all(row["same_bits"] for row in rows if row["task"] == "placement")
    runs = gpu.plan_runs([10], is_rehearsal=True)
    trained = [row for row in rows if row["task"] in ("fits", "exceeds")]
    assert [(row["task"], row["system"]) for row in trained] == [(run.task, gpu.NAMES[run.system]) for run in runs]
    assert all(row["tokens_per_s"] > 0 and row["setup_s"] > 0 for row in trained)
    table = (tmp_path / "gpu-targets.md").read_text()
    assert printed.endswith("\n" + table)
    assert "| every placement gives the same bits | all | 7 of 7 placements | met |" in table
    assert "| the GPU's Adam, of a device copy's bandwidth | at least 0.9 |  | not run |" in table


def test_the_cap_holds_for_torch_and_leaves_gemini_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: argparse.Namespace(total_memory=10**11))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    for cap_gb in (10, 24, 200):
        gpu_systems.cap_device("cuda", cap_gb * gpu.GB)
    assert fractions == [0.1, 0.24, 1.0]
    assert gpu_systems.gemini_config(child_options("gemini-host")).device_budget == 940_000_000


def test_deepspeed_pins_what_the_machine_can_hold() -> None:
    """Two buffers of 4 bytes and one of 2 bytes a parameter are rounded up to a power of two, moments are not."""
    assert gpu_systems.deepspeed_pinned_nbytes(1 << 30) == (4 + 4 + 2 + 8) << 30
    assert gpu_systems.deepspeed_pinned_nbytes((1 << 30) + 1) == ((8 + 8 + 4 + 8) << 30) + 8


def test_results_are_what_the_page_of_tables_looks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answer(command: list[str], deadline_of: object) -> Iterator[Said]:
        if any(word.endswith("gpu_bandwidth.py") for word in command):
            yield Said(1.0, [{"system": "ceiling", "task": "h2d", "gb_per_s": 55.0}])
            return
        if any(word.endswith("gpu_placements.py") for word in command):
            yield Said(1.0, {"system": "gemini, auto", "task": "placement", "same_bits": True})
            return
        yield Said(1.0, {"stage": "ready", "setup_s": 1.0})
        if "gemini-stream" in command:
            raise ChildError("not done after 75 s", [], None)
        yield Said(2.0, {"tokens_per_s": 100.0, "setup_s": 1.0, "peak_device_bytes": 9_000_000_000})

    monkeypatch.setattr(gpu, "follow_child", answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX_4090 (24 GB)")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--caps", "24", "--out", str(tmp_path / "results")])
    gpu.main()
    path = tables.newest("gpu", tmp_path / "results")
    assert path is not None
    assert path.name.startswith("gpu_nvidia-rtx-4090-24-gb_")
    page = tables.rewrite("<!-- results: gpu -->\n<!-- end -->", tmp_path / "results")
    assert "| fits | llama-1b | 24 | gemini, state on the host | 100 |  |  | 1 | 9 |" in page
    assert "| not done after 75 s |" in page
    document = json.loads(path.read_text())
    assert document["environment"]["gpu"] == "NVIDIA RTX_4090 (24 GB)"
    assert document["shapes"].keys() == {"llama-1b", "llama-7b"}
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert lines[0]["environment"]["gpu"] == "NVIDIA RTX_4090 (24 GB)"
    assert len(lines) == 1 + len(document["rows"])


def test_a_rehearsal_is_never_taken_for_a_measurement(tmp_path: Path) -> None:
    gpu.result_path(tmp_path, "cpu").write_text("{}")
    assert tables.newest("gpu", tmp_path) is None


def test_without_a_gpu_the_benchmark_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        gpu.main()
