"""What a directory of checkpoints holds, whatever fails while one is saved; training goes on."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patience import PATIENCE_S
from runs import Scenario, training
from torch.optim import lr_scheduler
from training_harness import PLACEMENTS, config_for, hybrid_adam, same_bits

from gemini import ConfigError, GeminiDDP, OffloadIOError, has_checkpoint
from gemini.checkpoint.directory import CheckpointDirectory, complete_checkpoints, find_checkpoint, read_manifest
from gemini.files.safetensors import SafetensorsWriter
from gemini.weights.values import read_parts

pytestmark = pytest.mark.processes


SCENARIO = Scenario(adam={"max_grad_norm": 0.1})
KEPT = "step-00000001-save-00001"


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Let the system refuse to make larger files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["reserve", "write"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When a full drive shows: where space can be reserved, and where it cannot."""
    if request.param == "write":

        def refuse(*_: Any) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    return str(request.param)


def expected_after(num_steps: int, swap: Path) -> dict[str, torch.Tensor]:
    with training(SCENARIO, "host", swap) as straight:
        straight.train(0, num_steps)
        return straight.run.weights


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("place", ["host", "resident"])
def test_a_full_drive_leaves_the_older_checkpoint_and_the_run(place: str, way: str, tmp_path: Path) -> None:
    with training(SCENARIO, place, tmp_path) as run:
        run.train(0, 1)
        run.save(tmp_path / "run")
        run.train(1, 2)
        with files_of_at_most(100_000), pytest.raises(OffloadIOError, match=f"{way}.*/rank-00000.safetensors"):
            run.save(tmp_path / "run")
        assert names(tmp_path / "run") == [KEPT]
        run.train(2, 3)
        assert same_bits(run.run.weights, expected_after(3, tmp_path))
        run.save(tmp_path / "run")
        assert names(tmp_path / "run") == [KEPT, "step-00000003-save-00002"]
        assert run.engine.load_checkpoint(tmp_path / "run" / KEPT).step == 1


def test_a_full_drive_behind_the_run_is_said_once_by_the_next_step(way: str, tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        run.train(0, 1)
        run.save(tmp_path / "run")
        with files_of_at_most(100_000):
            save = run.engine.save_checkpoint(tmp_path / "run", wait=False)
            run.engine(**run.scenario.case.batches(2)[1]).loss.backward()
            with pytest.raises(OffloadIOError, match=f"{way}.*/rank-00000.safetensors"):
                run.optimizer.step()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.scheduler.step()
        with pytest.raises(OffloadIOError):
            save.wait()
        assert names(tmp_path / "run") == [KEPT]
        assert same_bits(run.run.weights, expected_after(2, tmp_path))


def test_a_full_drive_is_told_when_the_engine_closes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with files_of_at_most(100_000), training(SCENARIO, "host", tmp_path) as run:
        run.engine.save_checkpoint(tmp_path / "run", wait=False)
    assert "the checkpoint of step 0 in" in caplog.text
    assert "is lost: cannot reserve space for" in caplog.text
    assert names(tmp_path / "run") == []


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let saves write nothing until an event is set."""
    append, go_on = SafetensorsWriter.append, threading.Event()

    def append_when_told(writer: SafetensorsWriter, name: str, values: torch.Tensor) -> None:
        assert go_on.wait(PATIENCE_S)
        append(writer, name, values)

    monkeypatch.setattr(SafetensorsWriter, "append", append_when_told)
    return go_on


@pytest.mark.parametrize("place", ["host", "nvme"])
def test_the_next_step_waits_for_a_slow_save(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = held_back(monkeypatch)
    with training(SCENARIO, place, tmp_path) as run:
        run.train(0, 1)
        expected = run.run.weights
        save = run.engine.save_checkpoint(tmp_path / "run", wait=False)
        run.engine(**run.scenario.case.batches(2)[1]).loss.backward()
        assert not save.is_done
        wait = save.wait

        def let_go() -> Path:
            assert go_on.is_set() or not save.is_done
            go_on.set()
            return wait()

        monkeypatch.setattr(save, "wait", let_go)
        run.optimizer.step()
        assert go_on.is_set()
        assert save.is_done
        run.optimizer.zero_grad()
        assert not same_bits(run.run.weights, expected)
        run.engine.load_checkpoint(save.wait())
        assert same_bits(run.run.weights, expected)


@pytest.mark.parametrize("place", PLACEMENTS)
def test_closing_the_engine_waits_for_a_save(place: str, tmp_path: Path) -> None:
    with training(SCENARIO, place, tmp_path) as run:
        run.train(0, 1)
        run.engine.save_checkpoint(tmp_path / "run", wait=False)
    read_manifest(find_checkpoint(tmp_path / "run"))
    assert names(tmp_path / "run") == [KEPT]


def test_saves_follow_one_another(tmp_path: Path) -> None:
    with training(SCENARIO, "nvme", tmp_path) as run:
        saves = [run.engine.save_checkpoint(tmp_path / "run", wait=False, keep_last=2) for _ in range(4)]
        paths = [save.wait() for save in saves]
        assert all(save.is_done for save in saves)
    assert [path.name for path in paths] == [f"step-00000000-save-0000{i}" for i in (1, 2, 3, 4)]
    assert complete_checkpoints(tmp_path / "run") == paths[2:]


def test_a_run_that_went_back_goes_on_from_where_it_was_last(tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        run.train(0, 1)
        first = run.engine.save_checkpoint(tmp_path / "run").wait()
        run.train(1, 3)
        run.engine.save_checkpoint(tmp_path / "run")
        run.engine.load_checkpoint(first)
        run.train(1, 2)
        run.engine.save_checkpoint(tmp_path / "run")
        assert run.engine.load_checkpoint(tmp_path / "run").step == 2


def test_what_earlier_saves_have_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".saving", ".removing-step-00000007-save-00003"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "rank-00000.safetensors").write_bytes(b"half")
    with training(SCENARIO, "host", tmp_path) as run:
        run.save(tmp_path / "run")
    assert names(tmp_path / "run") == ["step-00000000-save-00001"]


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run" / "step-00000009-save-00009").mkdir(parents=True)  # no manifest: no checkpoint
    (tmp_path / "run" / "notes").write_text("mine")
    with training(SCENARIO, "host", tmp_path) as run:
        for _ in range(3):
            run.engine.save_checkpoint(tmp_path / "run", keep_last=1)
    expected = ["notes", "step-00000000-save-00012", "step-00000009-save-00009"]
    assert names(tmp_path / "run") == expected


def test_one_process_at_a_time_saves_into_a_directory(tmp_path: Path) -> None:
    other = CheckpointDirectory(tmp_path / "run")
    other.begin()
    with training(SCENARIO, "host", tmp_path) as run:
        with pytest.raises(OffloadIOError, match="cannot lock .*/run: .*; another process is saving into it"):
            run.save(tmp_path / "run")
        assert names(tmp_path / "run") == [".saving"]  # the other's
        other.abandon()
        run.save(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK])
def test_file_systems_without_locks_are_used_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with training(SCENARIO, "host", tmp_path) as run:
        monkeypatch.setattr("fcntl.flock", refuse)
        run.save(tmp_path / "run")
    assert names(tmp_path / "run") == ["step-00000000-save-00001"]


def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with training(SCENARIO, "host", tmp_path) as run:
        with pytest.raises(OffloadIOError, match="cannot create directory .*/file: File exists"):
            run.save(tmp_path / "file")
        run.train(0, 1)


def test_gradients_that_wait_for_a_step_are_not_lost_silently(tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        run.engine(**run.scenario.case.batches(1)[0]).loss.backward()
        with pytest.raises(ConfigError, match=r"gradients wait for a step .* after optimizer\.step\(\)"):
            run.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def itself() -> list[Any]:
    """Return a list that contains itself."""
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra": {"model": object()}}, r"save_checkpoint: extra\['model'\]: expected tensors, numbers"),
        ({"extra": lambda: None}, "save_checkpoint: extra: expected tensors, numbers"),
        ({"extra": {"seen": [1, {"file": io.BytesIO()}]}}, r"extra\['seen'\]\[1\]\['file'\]: .* got _io.BytesIO"),
        ({"extra": itself()}, "save_checkpoint: extra: it contains itself, or is nested too deeply"),
        ({"keep_last": 0}, "save_checkpoint: keep_last: expected at least 1, or None for all, got 0"),
        ({"keep_last": 1.5}, "save_checkpoint: keep_last: expected at least 1, or None for all, got 1.5"),
        ({"keep_last": "2"}, "save_checkpoint: keep_last: expected at least 1, or None for all, got '2'"),
    ],
)
def test_what_cannot_be_kept_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        with pytest.raises(ConfigError, match=message):
            run.engine.save_checkpoint(tmp_path / "run", **fields)
        run.save(tmp_path / "run")
    assert names(tmp_path / "run") == ["step-00000000-save-00001"]


def test_numbers_of_numpy_are_kept(tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        run.scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: np.float64(0.5) * (1 + np.cos(step)))
        run.train(0, 1)
        extra = {"mean": np.float32(0.5), np.int64(3): (np.bool_(True), [np.int8(1)])}
        run.engine.save_checkpoint(tmp_path / "run", scheduler=run.scheduler, extra=extra)
        found = run.engine.load_checkpoint(tmp_path / "run", scheduler=run.scheduler)
    assert found.extra == {"mean": 0.5, 3: (True, [1])}


def test_a_view_is_kept_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        path = run.engine.save_checkpoint(tmp_path / "run", extra=torch.arange(1_000_000.0)[3:6]).wait()
        assert run.engine.load_checkpoint(path).extra.tolist() == [3, 4, 5]
    assert (path / "rank-00000.pt").stat().st_size < 100_000


def test_a_checkpoint_is_no_directory_for_checkpoints(tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        path = run.engine.save_checkpoint(tmp_path / "run").wait()
        with pytest.raises(ConfigError, match="is a checkpoint: expected a directory of checkpoints"):
            run.engine.save_checkpoint(path)
        run.engine.save_checkpoint(tmp_path / "run")


def test_the_working_directory_may_change_while_one_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with training(SCENARIO, "host", tmp_path) as run:
        save = run.engine.save_checkpoint("run", wait=False)
        (tmp_path / "elsewhere" / "run" / ".saving").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert save.wait() == tmp_path / "run" / "step-00000000-save-00001"
    assert names(tmp_path / "elsewhere" / "run") == [".saving"]


def test_a_thread_that_cannot_start_costs_the_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with training(SCENARIO, "nvme", tmp_path) as run:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                run.save(tmp_path / "run")
        run.train(0, 1)
        run.save(tmp_path / "run")
    assert names(tmp_path / "run") == [KEPT]


@pytest.mark.slow
def test_the_process_ends_when_the_checkpoint_is_complete(tmp_path: Path) -> None:
    """A program that neither waits nor closes the engine loses nothing."""
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent / "training")]!r}
from pathlib import Path
import threading
from gemini import GeminiDDP
from gemini.files.safetensors import SafetensorsWriter
from runs import Scenario
from training_harness import config_for
append, go_on = SafetensorsWriter.append, threading.Event()
def append_when_told(*arguments):
    go_on.wait()
    append(*arguments)
SafetensorsWriter.append = append_when_told
engine = GeminiDDP(Scenario().case.model(), config_for("nvme", Path(sys.argv[1])))
assert not engine.save_checkpoint(Path(sys.argv[1]) / "run", wait=False).is_done
go_on.set()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "lost" not in done.stderr
    assert names(tmp_path / "run") == ["step-00000000-save-00001"]


def test_the_child_of_a_fork_leaves_the_save_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = held_back(monkeypatch)
    with training(SCENARIO, "host", tmp_path) as run:
        save = run.engine.save_checkpoint(tmp_path / "run", wait=False)
        child = os.fork()
        if not child:
            save.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        go_on.set()
        assert save.wait().name == "step-00000000-save-00001"


def test_whether_there_is_a_checkpoint(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "step-00000009-save-00009").mkdir(parents=True)
    assert not has_checkpoint(tmp_path / "run")
    with training(SCENARIO, "host", tmp_path) as run:
        path = run.engine.save_checkpoint(tmp_path / "run").wait()
    assert has_checkpoint(tmp_path / "run")
    assert has_checkpoint(str(path))
    with pytest.raises(OffloadIOError, match="File name too long"):
        has_checkpoint(tmp_path / ("long" * 100))


def test_a_manifest_that_lies_beside_checkpoints_hides_none(tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        path = run.engine.save_checkpoint(tmp_path / "run").wait()
        (tmp_path / "run" / "manifest.json").write_text("{}")
        assert run.engine.load_checkpoint(tmp_path / "run").path == path


def make_schedulers(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return one of each kind; chained ones last."""
    single = [
        lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lr_scheduler.StepLR(optimizer, 2),
        lr_scheduler.MultiStepLR(optimizer, [2, 3]),
        lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
        lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False),
        lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False),
        lr_scheduler.ReduceLROnPlateau(optimizer),
        lr_scheduler.PolynomialLR(optimizer),
    ]
    chained = lr_scheduler.SequentialLR(optimizer, single[1:4:2], [2])
    return [*single, chained]


def test_every_kind_of_scheduler_is_kept(tmp_path: Path) -> None:
    with GeminiDDP(SCENARIO.case.model(), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        schedulers = make_schedulers(optimizer)
        for scheduler in schedulers:
            expected = scheduler.state_dict()
            engine.save_checkpoint(tmp_path / "run", scheduler=scheduler)
            engine.load_checkpoint(tmp_path / "run", scheduler=scheduler)
            assert scheduler.state_dict() == expected


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("trainable", ["", "blocks"])
def test_parameters_are_read_a_tile_at_a_time(place: str, trainable: str, tmp_path: Path) -> None:
    scenario = Scenario(place, trainable=trainable, model="tied_by_hand_large")
    with training(scenario, place, tmp_path) as run:
        runtime = run.engine.runtime
        masters = run.engine.master_state_dict()
        for name, place in runtime.layout.place_by_name.items():
            parts = [dict(part) for part in read_parts(runtime, place)]
            assert max(values.numel() for part in parts for values in part.values()) <= runtime.config.tile_numel
            kind = "master" if "master" in parts[0] else "weight"
            whole = torch.cat([part[kind] for part in parts]).view(place.spec.shape)
            assert torch.equal(whole, masters[name])
