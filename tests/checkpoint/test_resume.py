"""A run that is saved, and resumed by another process, goes on with the bits of one that never stopped."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import NUM_SAVED, NUM_STEPS, Scenario, Training, scenarios, training
from training_harness import Run, same_bits

pytestmark = pytest.mark.timeout(300)  # for the fixture, on a busy machine
REPOSITORY = Path(__file__).parents[2]
RUNS = Path(__file__).with_name("runs.py")


@dataclass(frozen=True)
class Halves:
    """The same run three times."""

    straight: Run
    saved: Run
    """Saved half way, and gone on."""
    resumed: Run


def run_straight(scenario: Scenario, swap: Path) -> Run:
    with training(scenario, "host", swap) as straight:
        straight.train(0, NUM_STEPS)
        return straight.run


def arithmetic_of(scenario: Scenario) -> str:
    """Return what of a scenario decides about bits: neither the placement nor when updates run does."""
    config = {name: value for name, value in scenario.config.items() if name != "overlap"}
    return repr((scenario.model, scenario.num_micro, scenario.trainable, config, scenario.adam))


def run_and_save(scenario: Scenario, swap: Path, directory: Path) -> Run:
    with training(scenario, scenario.place, swap) as saved:
        saved.train(0, NUM_SAVED)
        saved.save(directory)
        saved.train(NUM_SAVED, NUM_STEPS)
        return saved.run


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Halves]:
    """Every scenario run without a stop, saved, and resumed; all are resumed by one process."""
    directory = tmp_path_factory.mktemp("runs")
    swap = directory / "swap"
    swap.mkdir()
    torch.set_num_threads(1)  # sums depend on it; fixtures of a module come before those of each test
    different = {arithmetic_of(scenario): scenario for scenario in scenarios().values()}
    runs = {key: run_straight(scenario, swap) for key, scenario in different.items()}
    straight = {name: runs[arithmetic_of(scenario)] for name, scenario in scenarios().items()}
    saved = {name: run_and_save(scenario, swap, directory / name) for name, scenario in scenarios().items()}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, RUNS, directory], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = {name: Run(*run) for name, run in torch.load(directory / "resumed.pt").items()}
    return {name: Halves(straight[name], saved[name], resumed[name]) for name in straight}


@pytest.mark.slow
@pytest.mark.parametrize("name", scenarios())
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(name: str, halves: dict[str, Halves]) -> None:
    found = halves[name]

    assert found.resumed.losses == found.straight.losses
    assert same_bits(found.resumed.weights, found.straight.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", scenarios())
def test_saving_changes_no_bit(name: str, halves: dict[str, Halves]) -> None:
    found = halves[name]

    assert found.saved.losses == found.straight.losses
    assert same_bits(found.saved.weights, found.straight.weights)


def test_scenarios_do_what_they_are_named_for(tmp_path: Path) -> None:
    every = scenarios()
    with training(every["fp16-host"], "host", tmp_path) as overflowing:
        overflowing.train(0, NUM_SAVED)
        assert 0 < overflowing.engine.runtime.steps.num_skipped_steps < NUM_SAVED
    with training(every["clipped"], "nvme", tmp_path) as clipped:
        clipped.train(0, NUM_SAVED)
        assert min(norm for norm in clipped.norms if norm is not None) > 0.1
    with training(every["speculative-behind"], "nvme", tmp_path) as ahead:
        ahead.train(0, NUM_SAVED)
        assert ahead.engine.runtime.updates.stats.num_ahead > 0


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), torch.rand(()).item()

    with training(Scenario(), "host", tmp_path) as run:
        draw()
        np.random.normal()  # makes two, and keeps one
        run.save(tmp_path / "saved")
        expected = [draw() for _ in range(3)]
        run.engine.load_checkpoint(tmp_path / "saved")
        assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("place", ["device", "nvme"])
def test_the_first_step_of_a_resumed_run_fetches_ahead(place: str, tmp_path: Path) -> None:
    def num_misses_of_step(run: Training, step: int) -> int:
        before = run.engine.memory_report().num_misses
        run.train(step, step + 1)
        return run.engine.memory_report().num_misses - before

    scenario = Scenario(config={"prefetch_depth": 2})
    with training(scenario, place, tmp_path) as run:
        num_cold = num_misses_of_step(run, 0)
        run.train(1, 2)
        run.save(tmp_path / "saved")
        num_warm = num_misses_of_step(run, 2)
    with training(scenario, place, tmp_path) as resumed:
        resumed.engine.load_checkpoint(tmp_path / "saved", scheduler=resumed.scheduler)
        found = num_misses_of_step(resumed, 2)
        assert resumed.engine.memory_report().num_trace_mismatches == 0
    assert num_warm <= found < num_cold


def test_a_trace_of_other_chunks_is_dropped(tmp_path: Path) -> None:
    with training(Scenario(), "device", tmp_path) as run:
        run.train(0, 1)
        (names,) = run.engine.runtime.lookahead.state_dict().values()
    with training(Scenario(), "device", tmp_path) as other:
        lookahead = other.engine.runtime.lookahead
        lookahead.load_state_dict({"train": [*names, "chunk 0 (another and 3 more)"]})
        assert lookahead.state_dict() == {}
        lookahead.load_state_dict({"train": names})
        assert lookahead.state_dict() == {"train": names}


def test_a_loaded_engine_counts_on_from_the_step(tmp_path: Path) -> None:
    with training(Scenario(), "host", tmp_path) as run:
        run.train(0, 2)
        run.save(tmp_path / "saved")
        run.train(2, 3)
        found = run.engine.load_checkpoint(tmp_path / "saved")
        assert found.step == 2
        assert found.path.name == "step-00000002-save-00001"
        assert run.engine.runtime.steps.num_steps == 2
