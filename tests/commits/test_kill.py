"""A process that is killed while it trains leaves its last committed step, always."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import committed_runs
import pytest
import torch
from committed_runs import DISK_MIXTURES, Scenario, attached, memory_file, scenarios, uninterrupted
from forking import fork_context
from training_harness import Run

NUM_KILLS = 50
NUM_STEPS = 400
LONGEST_S = 0.15
PLACES = {
    "memory": Scenario(model="wide", config={"overlap": "next-forward", "tile_numel": 65536}),
    "disk": Scenario("nvme", "wide", config={"overlap": "next-forward", "tile_numel": 65536}),
    "mixed": Scenario(
        "nvme",
        "wide",
        config={"overlap": "next-forward", "tile_numel": 65536, "placement": DISK_MIXTURES["halves"]},
    ),
}


def go_on(place: str, directory: Path, address: tuple[int, int], started: Connection) -> None:
    """Train on, up to the last step, and save what came of it."""
    torch.set_num_threads(1)
    descriptor = os.open(f"/proc/{address[0]}/fd/{address[1]}", os.O_RDWR)
    with attached(PLACES[place], directory, descriptor) as training:
        started.send(training.step)
        training.train(NUM_STEPS)
        torch.save((training.run.losses, training.run.weights), directory / "run.pt")


def load_run(directory: Path) -> Run:
    return Run(*torch.load(directory / "run.pt"))


def assert_same(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", PLACES)
def test_fifty_kills_change_no_bit(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = fork_context(monkeypatch)
    delays = random.Random(0)
    steps = [0]
    with memory_file(PLACES[place], tmp_path) as descriptor:
        for number in range(NUM_KILLS + 1):
            ours, theirs = context.Pipe()
            arguments = (place, tmp_path, (os.getpid(), descriptor), theirs)
            process = context.Process(target=go_on, args=arguments)
            process.start()
            theirs.close()
            assert ours.poll(60)
            steps.append(int(ours.recv()))
            if number < NUM_KILLS:
                time.sleep(delays.uniform(0, LONGEST_S))
                process.kill()
            process.join()
            assert process.exitcode == (-9 if number < NUM_KILLS else 0)
    assert steps == sorted(steps)
    assert NUM_KILLS // 2 < steps[-1] < NUM_STEPS
    assert_same(load_run(tmp_path), uninterrupted(PLACES[place], tmp_path, NUM_STEPS))


def test_a_program_goes_on_with_the_descriptor_it_is_given(tmp_path: Path) -> None:
    name, num_steps = "host-next-forward", 200
    command = [sys.executable, committed_runs.__file__]
    scenario = scenarios()[name]
    with memory_file(scenario, tmp_path) as descriptor:
        arguments = [str(descriptor), name, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            [*command, *arguments, "1000"], pass_fds=[descriptor], env=environment, stdout=subprocess.PIPE
        ) as killed:
            assert killed.stdout is not None
            assert killed.stdout.readline() == b"0\n"
            time.sleep(0.05)
            killed.kill()
        subprocess.run([*command, *arguments, str(num_steps)], pass_fds=[descriptor], env=environment, check=True)
    assert_same(load_run(tmp_path), uninterrupted(scenario, tmp_path, num_steps))
