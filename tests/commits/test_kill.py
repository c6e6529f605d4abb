"""A process that is killed while it trains leaves its last committed step, always."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import committed_runs
import pytest
import torch
from committed_runs import DISK_MIXTURES, Scenario, attached, memory_file, scenarios, uninterrupted
from fate import Fate, Fated, draw_fate, end_of, receive
from forking import fork_context
from training_harness import Run

pytestmark = pytest.mark.processes


NUM_KILLS = 50
NUM_STEPS_A_LIFE = 4
"""Each process is killed within so many."""
PLACES = {
    "memory": Scenario(model="wide", config={"overlap": "next-forward", "tile_numel": 65536}),
    "disk": Scenario("nvme", "wide", config={"overlap": "next-forward", "tile_numel": 65536}),
    "mixed": Scenario(
        "nvme",
        "wide",
        config={"overlap": "next-forward", "tile_numel": 65536, "placement": DISK_MIXTURES["halves"]},
    ),
}


def go_on(
    place: str, directory: Path, address: tuple[int, int], parent: Connection, fate: Fate | None, num_steps: int
) -> None:
    """Train on until killed; without a fate for a number of steps, and save what came of it."""
    torch.set_num_threads(1)
    descriptor = os.open(f"/proc/{address[0]}/fd/{address[1]}", os.O_RDWR)
    fated = Fated(fate, parent.send, parent.recv)
    with attached(PLACES[place], directory, descriptor) as training:
        parent.send(training.step)
        fated.begin()
        end = training.step + num_steps
        while fate is not None or training.step < end:
            training.train(training.step + 1)
            fated.end_step()
        parent.send(fated.end())
        torch.save((training.run.losses, training.run.weights), directory / "run.pt")


def load_run(directory: Path) -> Run:
    return Run(*torch.load(directory / "run.pt"))


def assert_same(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("place", PLACES)
def test_fifty_kills_change_no_bit(place: str, tmp_path: Path) -> None:
    context, choose = fork_context(), random.Random(0)
    steps = []
    with memory_file(PLACES[place], tmp_path) as descriptor:

        def live(fate: Fate | None) -> int | None:
            """Let a process train on; return how many calls and returns that took it, if it was not killed."""
            ours, theirs = context.Pipe()
            arguments = (place, tmp_path, (os.getpid(), descriptor), theirs, fate, NUM_STEPS_A_LIFE)
            process = context.Process(target=go_on, args=arguments)
            process.start()
            theirs.close()
            steps.append(int(receive(ours)))
            said = end_of(process, ours)
            assert process.exitcode == (0 if fate is None else -9)
            return said[0] if said else None

        num_events = live(None)
        assert num_events is not None
        for _ in range(NUM_KILLS):
            live(draw_fate(choose, num_events))
        live(None)
    assert steps == sorted(steps)
    assert steps[-1] > NUM_KILLS // 2
    assert_same(load_run(tmp_path), uninterrupted(PLACES[place], tmp_path, steps[-1] + NUM_STEPS_A_LIFE))


@pytest.mark.slow
def test_a_program_goes_on_with_the_descriptor_it_is_given(tmp_path: Path) -> None:
    name, num_steps = "host-next-forward", 20
    command = [sys.executable, committed_runs.__file__]
    scenario = scenarios()[name]
    with memory_file(scenario, tmp_path) as descriptor:
        arguments = [str(descriptor), name, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            [*command, *arguments, str(num_steps - 1), "held"],
            pass_fds=[descriptor],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as killed:
            assert killed.stdout is not None
            assert [killed.stdout.readline() for _ in range(4)] == [b"0\n", b"1\n", b"2\n", b"3\n"]
            killed.kill()
        done = subprocess.run(
            [*command, *arguments, str(num_steps)],
            pass_fds=[descriptor],
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
        )
        assert int(done.stdout.split()[0]) >= 2  # the third may not have been complete yet
    assert_same(load_run(tmp_path), uninterrupted(scenario, tmp_path, num_steps))
