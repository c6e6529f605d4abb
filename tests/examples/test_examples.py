"""The examples run as a user runs them: as programs of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from patience import PATIENCE_S

from gemini.profile import read_recording

pytestmark = pytest.mark.processes


pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

REPOSITORY = Path(__file__).parents[2]


def start_example(
    name: str, *arguments: str | Path | int, stdout: int | IO[Any] = subprocess.PIPE
) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "examples" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, text=True, env=environment)


def run_example(name: str, *arguments: str | Path | int) -> str:
    process = start_example(name, *arguments)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished tiny run."""
    out = tmp_path_factory.mktemp("quickstart")
    options = ("--tiny", "--dtype", "fp32", "--steps", "8", "--lr", "3e-3", "--record", out / "recording")
    (out / "output").write_text(run_example("quickstart.py", *options, "--out", out))
    return out


def test_quickstart_learns_and_uses_the_disk(quickstart: Path) -> None:
    summary = json.loads((quickstart / "summary.json").read_text())

    assert summary["steps"] == 8
    assert summary["loss_last"] < summary["loss_first"] - 0.1
    assert summary["nvme_bytes_read"] > 0
    assert summary["nvme_bytes_written"] > 0
    assert summary["memory_report"]["num_fetches"] > 0
    assert summary["memory_report"]["num_skipped_steps"] == 0


def test_quickstart_records_what_it_is_asked_to_and_says_how_to_see_it(quickstart: Path) -> None:
    recording = read_recording(quickstart / "recording")
    losses = json.loads((quickstart / "summary.json").read_text())["losses"]

    assert [recording.logged[step]["loss"] for step in range(8)] == losses
    assert len(recording.detailed_steps) == 3
    assert f"python -m gemini report {quickstart / 'recording'}" in (quickstart / "output").read_text()


@pytest.mark.slow
def test_options_of_several_ranks_say_their_defaults() -> None:
    text = " ".join(run_example("train_zero.py", "--help").split())
    for default in ("first weights and batches (0)", "all processes together (2400MiB)", "optimizer steps (10)"):
        assert default in text


@pytest.mark.slow
def test_quickstart_summary_has_what_readers_look_for(quickstart: Path) -> None:
    summary = json.loads((quickstart / "summary.json").read_text())

    assert summary["tokens_per_s"] > 0
    assert summary["stall_s"] >= 0
    assert summary["peak_rss_bytes"] > summary["import_rss_bytes"] > 0
    assert summary["plain_state_bytes"] == 16 * summary["num_params"]
    assert summary["settings"]["dtype"] == "torch.float32"
    assert set(summary["versions"]) == {"python", "torch", "transformers"}


@pytest.mark.slow
def test_quickstart_leaves_no_swap_file(quickstart: Path) -> None:
    assert list((quickstart / "swap").iterdir()) == []


@pytest.mark.slow
def test_interrupted_quickstart_leaves_no_swap_file(tmp_path: Path, quickstart: Path) -> None:
    with (tmp_path / "output").open("w+") as output:
        out, swap = quickstart, tmp_path / "swap"
        process = start_example(
            "quickstart.py",
            "--tiny",
            "--dtype",
            "fp32",
            "--steps",
            "100000",
            "--out",
            out,
            "--nvme",
            swap,
            stdout=output,
        )
        while "Model:" not in (tmp_path / "output").read_text():
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        assert list(swap.iterdir())

        process.send_signal(signal.SIGINT)

        assert process.wait(PATIENCE_S) == 130
    assert "Interrupted" in (tmp_path / "output").read_text()
    assert "Traceback" not in (tmp_path / "output").read_text()
    assert list(swap.iterdir()) == []


def losses_of(summary: Path) -> list[float]:
    losses: list[float] = json.loads(summary.read_text())["losses"]
    return losses


@pytest.mark.slow
def test_a_quickstart_that_is_told_to_stop_saves_and_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--tiny", "--dtype", "fp32", "--lr", "3e-3", "--out", out, "--checkpoint", tmp_path / "saved")
    with (tmp_path / "output").open("w+") as output:
        process = start_example("quickstart.py", *arguments, "--steps", "100000", "--save-every", "1", stdout=output)
        while not list(tmp_path.glob("saved/step-*")):
            assert process.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    match = re.search(r"SIGTERM: saved after step (\d+);", (tmp_path / "output").read_text())
    assert match is not None
    num_steps = int(match[1])
    losses = losses_of(out / "summary.json")
    assert len(losses) == num_steps

    run_example("quickstart.py", *arguments, "--steps", num_steps + 2, "--resume")
    losses += losses_of(out / "summary.json")
    run_example("quickstart.py", *arguments[:-2], "--steps", num_steps + 2)

    assert losses == losses_of(out / "summary.json")


@pytest.mark.slow
def test_train_hf_trains_a_shape_from_a_config_file_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times. " * 50)

    arguments = (
        "--config", tmp_path / "config.json", "--text", tmp_path / "text", "--cache", tmp_path, "--device", "cpu",
        "--dtype", "fp32", "--tokens", "32", "--seq", "16", "--accumulate", "2", "--checkpoint-activations",
        "--json", tmp_path / "summary.json", "--checkpoint", tmp_path / "saved",
    )  # fmt: skip
    run_example("train_hf.py", *arguments, "--save-every", "2")

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["memory_report"]["num_skipped_steps"] == 0

    shutil.rmtree(tmp_path / "saved" / "step-00000003-save-00002")
    run_example("train_hf.py", *arguments, "--resume")
    assert losses_of(tmp_path / "summary.json") == summary["losses"][2:]


def start_train_zero(*arguments: str | Path | int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "examples/train_zero.py", "--tiny", *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    return output


def step_losses(output: str) -> list[str]:
    return re.findall(r"step \d+: loss \S+", output)


@pytest.mark.slow
def test_train_zero_stops_when_one_process_is_told_to_and_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    arguments = ("--out", tmp_path, "--checkpoint", tmp_path / "saved")
    process = start_train_zero(*arguments, "--steps", 100000, "--save-every", 1)
    while not list(tmp_path.glob("saved/step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children() if "examples/train_zero.py" in child.cmdline()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGTERM)

    output = finish(process)

    match = re.search(r"SIGTERM: saved after step (\d+);", output)
    assert match is not None, output
    num_steps = int(match[1])
    resumed = finish(start_train_zero(*arguments, "--steps", num_steps + 1, "--resume"))
    straight = finish(start_train_zero("--out", tmp_path, "--steps", num_steps + 1))
    assert step_losses(output) + step_losses(resumed) == step_losses(straight)
    assert "2 processes, stage 3" in straight
    assert list((tmp_path / "swap").iterdir()) == []


@pytest.mark.slow
def test_train_tensor_parallel_divides_layers_among_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["examples/train_tensor_parallel.py", "--tiny", "--tp", "2", "--steps", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, timeout=PATIENCE_S
    )

    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout.decode()
    assert "1 x 2 processes, stage 3" in output
    assert "step 2: loss" in output
    assert list((tmp_path / "swap").iterdir()) == []


def test_train_ray_shares_the_model_among_workers(tmp_path: Path) -> None:
    pytest.importorskip("ray.train", reason="Ray Train is not installed")
    output = run_example("train_ray.py", "--tiny", "--steps", "2", "--workers", "2", "--out", tmp_path)

    assert "2 processes, stage 3" in output
    assert "step 2: loss" in output
    assert "Trained by 2 workers" in output
    assert list((tmp_path / "swap").iterdir()) == []


def test_train_ray_says_what_it_needs() -> None:
    """Whether Ray is installed or not: None in sys.modules hides it."""
    program = REPOSITORY / "examples" / "train_ray.py"
    code = f"""
import runpy, sys
sys.modules["ray"] = None
sys.path.insert(0, {str(program.parent)!r})
runpy.run_path({str(program)!r}, run_name="__main__")
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )

    assert done.returncode == 1
    assert done.stderr == 'train_ray.py needs Ray Train: pip install "ray[train]", or use train_zero.py\n'
