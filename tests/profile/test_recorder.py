"""Recordings of real runs say what the engine's own counters say."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from faults import FULL_DEVICE, descriptors_of
from recorded import NUM_LAYERS, NUM_STEPS, WIDTH, config_for, make_model, record, train_step

import zero
from gemini import ConfigError, GeminiDDP, HybridAdam
from gemini.observe.run_recorder import RunRecorder, describe_run
from gemini.profile.events import Work
from gemini.profile.lanes import LANES, bars_of_step
from gemini.profile.recording import Recording, RecordingWriter, read_recording
from gemini.profile.series import run_series
from gemini.profile.stalls import stalls_of_step

PLACES = ("disk", "three tiers")


def bytes_of(recording: Recording, operation: str) -> int:
    return sum(work.nbytes for work in recording.work if work.operation == operation)


@pytest.mark.parametrize("place", PLACES)
def test_bytes_fetches_and_waits_are_those_of_the_engine(place: str, tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for(place, tmp_path)) as engine:
        traffic = engine.runtime.resources.transfers.traffic
        moved = traffic.uploaded_nbytes, traffic.downloaded_nbytes
        before, after = record(engine, tmp_path / "run", steps=None)
        moved = traffic.uploaded_nbytes - moved[0], traffic.downloaded_nbytes - moved[1]
        num_updates = after.updates.num_updates + after.updates.num_redone - before.updates.num_updates
    found = read_recording(tmp_path / "run")
    assert (bytes_of(found, "upload"), bytes_of(found, "download")) == moved
    assert bytes_of(found, "read") == after.nvme_read_nbytes - before.nvme_read_nbytes > 0
    assert bytes_of(found, "write") == after.nvme_written_nbytes - before.nvme_written_nbytes > 0
    num_fetches = sum(change.state == "fetching" for change in found.chunk_changes)
    assert num_fetches == after.num_fetches - before.num_fetches > 0
    waited = {
        reason: sum(s.end_ns - s.begin_ns for s in found.stalls if s.reason == reason)
        for reason in ("weights", "update")
    }
    assert waited["weights"] / 1e9 == pytest.approx(after.fetch_stall_s - before.fetch_stall_s, abs=1e-6)
    assert waited["update"] / 1e9 == pytest.approx(after.update_stall_s - before.update_stall_s, abs=1e-6)
    tiles = -(-(WIDTH * WIDTH + WIDTH) // 4096)
    assert Counter(work.operation for work in found.work)["adam update"] == num_updates * tiles


@pytest.mark.parametrize("place", PLACES)
def test_steps_add_up_to_the_reports_counters(place: str, tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for(place, tmp_path)) as engine:
        optimizer = HybridAdam(engine.parameters())
        with engine.record(tmp_path / "run") as recorder:
            for _ in range(NUM_STEPS):
                recorder.log(loss=train_step(engine, optimizer), tokens=8)
        stats, stalled_s = engine.runtime.core.stats, engine.runtime.updates.stall_s
        found = read_recording(tmp_path / "run")
        assert [step.number for step in found.steps] == [0, 1, 2]
        assert [step.is_detailed for step in found.steps] == [False, True, True]
        # What is fetched ahead after the last step has ended is nobody's yet.
        assert stats.num_fetches - engine.runtime.plan.num_slots <= sum(s.num_fetches for s in found.steps)
        assert sum(step.num_fetches for step in found.steps) <= stats.num_fetches
        assert sum(step.num_misses for step in found.steps) == stats.num_misses
        assert sum(step.weights_stall_s for step in found.steps) == pytest.approx(stats.stall_s, abs=1e-9)
        # So are its waits for updates, of no length or little.
        later_s = sum(s.end_ns - s.begin_ns for s in found.stalls if s.begin_ns > found.steps[-1].end_ns) / 1e9
        assert sum(step.update_stall_s for step in found.steps) + later_s == pytest.approx(stalled_s, abs=1e-6)


def test_every_job_has_its_chunk_and_ran_within_the_recording(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("three tiers", tmp_path)) as engine:
        begin_ns = time.perf_counter_ns()
        record(engine, tmp_path / "run", steps=None)
        end_ns = time.perf_counter_ns()
    found = read_recording(tmp_path / "run")
    assert {work.chunk_id for work in found.work} == set(range(NUM_LAYERS))
    assert all(begin_ns <= work.begin_ns <= work.end_ns <= end_ns for work in found.work)
    known = {("read", "state"), ("write", "state"), ("upload", "weights"), ("adam update", "")}
    assert known <= {(work.operation, work.what) for work in found.work}


def test_waits_and_moments_lie_in_their_steps(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        record(engine, tmp_path / "run", steps=[1])
    found = read_recording(tmp_path / "run")
    step = found.step()
    assert step.number == 1
    shown_s = sum(each.seconds for each in stalls_of_step(found, step))
    assert shown_s == pytest.approx(step.weights_stall_s + step.update_stall_s, abs=1e-3)
    assert sum(each.seconds for each in stalls_of_step(found, step)) <= (step.end_ns - step.begin_ns) / 1e9
    kinds = Counter((moment.kind, moment.unit_id) for moment in found.moments)
    layers = range(1, NUM_LAYERS + 1)
    assert kinds == Counter(
        {
            ("enter", 0): 1,
            ("leave", 0): 1,
            ("update", None): 1,
            **{("enter", unit): 1 for unit in layers},
            **{("leave", unit): 1 for unit in layers},
            **{("backward", unit): 1 for unit in layers},
        }
    )
    assert set(LANES) - {bar.lane for bar in bars_of_step(found, step)} <= {"host to device", "device to host"}


def test_memory_is_that_of_the_ledger_and_within_the_budget(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("three tiers", tmp_path)) as engine:
        record(engine, tmp_path / "run", steps=[1])
        ledger = {report.tier: report.held_nbytes for report in engine.memory_report().tiers}
    found = read_recording(tmp_path / "run")
    last = {sample.tier: sample for sample in found.samples}
    assert last["device"].held_nbytes == ledger["device"]
    assert last["host"].held_nbytes == ledger["host"]
    assert sum(last["device"].held_nbytes.values()) <= 16 << 20


def test_what_the_loop_logs_belongs_to_the_step_under_way_or_else_the_last(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        optimizer = HybridAdam(engine.parameters())
        with engine.record(tmp_path / "run") as recorder:
            loss = engine(torch.ones(8, WIDTH)).square().mean()
            recorder.log(loss=loss)  # with its graph, before the step has ended
            loss.backward()
            optimizer.step()
            recorder.log(tokens=8)
            train_step(engine, optimizer)
            recorder.log(loss=torch.tensor([2.0]))
    found = read_recording(tmp_path / "run")
    assert found.logged == {0: {"loss": loss.item(), "tokens": 8.0}, 1: {"loss": 2.0}}
    series = run_series(found)
    assert series.loss == (loss.item(), 2.0)
    assert series.tokens_per_s == (8 / series.seconds[0], None)


def test_recording_changes_no_bit(tmp_path: Path) -> None:
    weights = []
    for is_recorded in (False, True):
        with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
            if is_recorded:
                record(engine, tmp_path / "run", steps=None)
            else:
                optimizer = HybridAdam(engine.parameters(), lr=1e-3)
                for _ in range(NUM_STEPS):
                    train_step(engine, optimizer)
            weights.append(engine.master_state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_after_the_context_nobody_is_told_of_anything(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        record(engine, tmp_path / "run", steps=None)
        nbytes = (tmp_path / "run" / "rank0.jsonl").stat().st_size
        train_step(engine, HybridAdam(engine.parameters()))
        runtime = engine.runtime
        assert (tmp_path / "run" / "rank0.jsonl").stat().st_size == nbytes
        assert runtime.resources.pool.take_spans() == []
        assert len(runtime.listeners) == 0


def test_an_evaluation_between_steps_is_no_step(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        optimizer = HybridAdam(engine.parameters())
        with engine.record(tmp_path / "run", steps=None):
            train_step(engine, optimizer)
            with torch.no_grad():
                engine(torch.ones(8, WIDTH))
            train_step(engine, optimizer)
    assert [step.number for step in read_recording(tmp_path / "run").steps] == [0, 1]


def test_an_engine_closed_while_it_is_recorded_leaves_its_recording(tmp_path: Path) -> None:
    engine = GeminiDDP(make_model(), config_for("disk", tmp_path))
    with engine.record(tmp_path / "run", steps=None):
        train_step(engine, HybridAdam(engine.parameters()))
        engine.close()
    assert len(read_recording(tmp_path / "run").steps) == 1


def test_an_engine_is_recorded_once_at_a_time(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine, engine.record(tmp_path / "run"):
        second = engine.record(tmp_path / "other")
        with pytest.raises(ConfigError, match="is being recorded already"):
            second.__enter__()


def test_a_full_drive_ends_the_recording_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        optimizer = HybridAdam(engine.parameters())
        with RecordingWriter(tmp_path / "run", describe_run(engine.runtime, None)) as writer:
            full = os.open(FULL_DEVICE, os.O_WRONLY)
            (number,) = descriptors_of(tmp_path / "run" / "rank0.jsonl")
            os.dup2(full, number)
            os.close(full)
            recorder = RunRecorder(engine.runtime, writer, steps=None)
            for _ in range(2):
                train_step(engine, optimizer)
            recorder.close()
        train_step(engine, optimizer)
    assert engine.runtime.steps.num_steps == 3
    (told,) = [record.getMessage() for record in caplog.records if "has ended" in record.getMessage()]
    assert "rank0.jsonl has ended, and training goes on: [Errno 28] No space left on device" in told


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from recorded import config_for, make_model, train_step
from gemini import GeminiDDP, HybridAdam
directory = Path({directory!r})
with GeminiDDP(make_model(), config_for("disk", directory)) as engine:
    optimizer = HybridAdam(engine.parameters())
    with engine.record(directory / "run", steps=None) as recorder:
        while True:
            recorder.log(loss=train_step(engine, optimizer))
            print("stepped", flush=True)
"""


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_run_leaves_a_recording_of_its_steps(tmp_path: Path) -> None:
    program = KILLED.format(path=[str(Path(__file__).parent), *sys.path], directory=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for _ in range(4):
            assert child.stdout.readline() == "stepped\n"
        child.kill()
    found = read_recording(tmp_path / "run")
    assert len(found.steps) >= 4
    assert len(found.logged) >= 4
    assert any(isinstance(work, Work) for work in found.work)
    assert stalls_of_step(found, found.step()) or found.step().num_misses == 0


def test_a_run_is_described_with_its_homes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, logger="gemini"),
        GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine,
    ):
        record(engine, tmp_path / "run")
    run = read_recording(tmp_path / "run").run
    assert (run.compute_tier, run.dtype, run.num_params) == ("host", "float32", NUM_LAYERS * (WIDTH * WIDTH + WIDTH))
    assert run.units == ("", "0", "1", "2", "3")
    assert set(run.chunks[0].homes) == {"weights", "state", "gradients"}
    assert set(run.chunks[0].homes["state"]) == {"nvme"}
    assert "recording to" in caplog.text


def test_a_rank_of_a_group_is_recorded_like_an_engine_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with zero.shard(make_model(), config_for("three tiers", tmp_path)) as engine:
            before, after = record(engine, tmp_path / "run", steps=None)
    finally:
        dist.destroy_process_group()
    found = read_recording(tmp_path / "run")
    assert len(found.steps) == NUM_STEPS
    assert bytes_of(found, "read") == after.nvme_read_nbytes - before.nvme_read_nbytes > 0
    assert {work.chunk_id for work in found.work} == set(range(NUM_LAYERS))
