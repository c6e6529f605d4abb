"""Engines with memory from a service: the same bits, one copy of frozen weights, state that outlives kills."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine_job
import pytest
import torch
from committed_runs import Training, uninterrupted
from patience import PATIENCE_S
from safetensors.torch import save
from service_process import MIB, ServiceProcess, running_service, wait_until
from training_harness import Run

from gemini import ConfigError, GeminiConfig, GeminiDDP, MemoryTier, OutOfTierMemoryError, ServiceError
from gemini.assembly.node_memory import NodeMemory
from gemini.errors import CheckpointMismatchError
from gemini.ranks.sharding import Sharding

pytestmark = pytest.mark.processes


JOB = Path(engine_job.__file__)
NUM_STEPS = 4
NUM_STEPS_A_LIFE = 4


@pytest.fixture
def node() -> Iterator[ServiceProcess]:
    with running_service(host="1GiB", disk="1GiB") as service:
        yield service


@contextmanager
def job(
    service: ServiceProcess, name: str, place: str, directory: Path, *options: str, num_steps: int = NUM_STEPS
) -> Iterator[subprocess.Popen[str]]:
    """Run a job in a process; it is killed in the end."""
    arguments = [service.address, name, place, str(directory), str(num_steps), *options]
    command = [sys.executable, str(JOB), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_step(process: subprocess.Popen[str]) -> int:
    word, number = process.stdout.readline().split()
    assert word == "step"
    return int(number)


def result_of(name: str, directory: Path) -> Run:
    return Run(*torch.load(directory / f"{name}.pt"))


def assert_same(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def configuration(place: str, service: ServiceProcess, directory: Path, **options: object) -> GeminiConfig:
    own = {"service": service.address, "job": "here", **options}
    return dataclasses.replace(engine_job.PLACES[place].configuration(directory), **own)


@pytest.mark.parametrize(
    ("place", "snapshots"),
    [
        *((place, snapshots) for place in ("memory", "disk", "mixed", "frozen") for snapshots in (False, True)),
        ("frozen on a device", False),  # what is trained on a device is not kept
    ],
)
def test_training_has_the_bits_of_an_engine_alone(
    place: str, snapshots: bool, node: ServiceProcess, tmp_path: Path
) -> None:
    scenario = engine_job.PLACES[place]
    with GeminiDDP(scenario.build(0), configuration(place, node, tmp_path, snapshots=snapshots)) as engine:
        training = Training(scenario, engine)
        training.train(1, commits=snapshots)
        memory = engine.runtime.resources.granted_by
        before = memory.client.num_messages
        training.train(NUM_STEPS, commits=snapshots)
        assert memory.client.num_messages == before
        state = node.state()
        held = state.host.leased + state.host.shared
        assert held == config_nbytes(place, tmp_path)
        assert (state.host.shared > 0) == place.startswith("frozen")
        assert (state.disk.leased > 0) == (place in ("disk", "mixed"))
        assert_same(training.run, uninterrupted(scenario, tmp_path, NUM_STEPS))
    wait_until(lambda: node.state().host.leased == node.state().disk.leased == 0)
    assert node.state().host.kept == 0


def config_nbytes(place: str, directory: Path) -> int:
    budget = engine_job.PLACES[place].configuration(directory).host_budget
    assert isinstance(budget, str)
    return int(budget.removesuffix("MiB")) * MIB


@pytest.mark.slow
def test_a_job_that_does_not_fit_beside_another_waits_for_it(tmp_path: Path) -> None:
    nbytes = config_nbytes("memory", tmp_path)
    with (
        running_service(host=f"{nbytes * 3 // 2}B") as service,
        job(service, "first", "memory", tmp_path, "held") as first,
    ):
        assert [read_step(first), read_step(first)] == [0, 1]
        with job(service, "second", "memory", tmp_path, "held") as second:
            wait_until(lambda: [row.state for row in service.rows("second")] == ["waiting"])
            assert service.state().host.leased == nbytes
            first.communicate("\n" * NUM_STEPS)
            assert read_step(second) == 0
            assert service.state().host.leased == nbytes
            second.communicate("\n" * NUM_STEPS)
    assert_same(result_of("second", tmp_path), result_of("first", tmp_path))


def test_what_never_fits_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with (
        running_service(host="8MiB") as service,
        pytest.raises(
            OutOfTierMemoryError, match="256.00 MiB of host memory .* can never be granted: the whole node has 8.00 MiB"
        ),
    ):
        GeminiDDP(engine_job.PLACES["memory"].build(0), configuration("memory", service, tmp_path))


def memory_file_nbytes(processes: list[subprocess.Popen[str]]) -> int:
    """Return the bytes of memory files that processes map, what several map counted once (proportional set size)."""
    total = 0
    for process in processes:
        is_memory_file = False
        for line in Path(f"/proc/{process.pid}/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                is_memory_file = "memfd:" in line
            elif is_memory_file and line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


@pytest.mark.slow
def test_jobs_with_one_base_hold_one_copy_of_it(node: ServiceProcess, tmp_path: Path) -> None:
    with (
        job(node, "a", "frozen", tmp_path, "held") as a,
        job(node, "b", "frozen", tmp_path, "held") as b,
        job(node, "c", "frozen", tmp_path, "held") as c,
    ):
        processes = [a, b, c]
        for process in processes:
            assert [read_step(process), read_step(process)] == [0, 1]
        (shared,) = node.state().shared
        assert shared.num_users == 3
        assert memory_file_nbytes(processes) == pytest.approx(shared.nbytes, rel=0.01)
        for process in processes:
            process.communicate("\n" * NUM_STEPS)
    assert_same(result_of("b", tmp_path), result_of("a", tmp_path))
    assert_same(result_of("a", tmp_path), uninterrupted(engine_job.PLACES["frozen"], tmp_path, NUM_STEPS))
    (unused,) = node.state().shared
    assert (unused.num_users, unused.is_filled) == (0, True)


def test_frozen_weights_that_are_loaded_stay_in_the_process(node: ServiceProcess, tmp_path: Path) -> None:
    scenario = engine_job.PLACES["frozen"]
    with (
        GeminiDDP(scenario.build(0), configuration("frozen", node, tmp_path)) as engine,
        GeminiDDP(scenario.build(0), configuration("frozen", node, tmp_path, job="other")) as other,
    ):
        before = other.state_dict()
        engine.load_state_dict({name: value + 1 for name, value in before.items()})
        assert all(torch.equal(value, before[name] + 1) for name, value in engine.state_dict().items())
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_file_that_replaces_another_of_its_inode_length_and_time_is_read(
    node: ServiceProcess, tmp_path: Path
) -> None:
    scenario, path = engine_job.PLACES["frozen"], tmp_path / "model.safetensors"
    for seed in (0, 1):
        expected = scenario.build(seed).state_dict()
        content = save(expected)
        if seed == 0:
            path.write_bytes(content)
        else:
            with path.open("r+b") as file:
                file.write(content)
        os.utime(path, (1e9, 1e9))  # as `tar` and `rsync` do
        config = configuration("frozen", node, tmp_path)
        with GeminiDDP(scenario.build(2), config, weights=tmp_path) as engine:
            assert all(torch.equal(value, expected[name]) for name, value in engine.state_dict().items())


def test_engines_of_one_process_need_no_names(node: ServiceProcess, tmp_path: Path) -> None:
    scenario, config = engine_job.PLACES["frozen"], configuration("frozen", node, tmp_path, job=None)
    with GeminiDDP(scenario.build(0), config), GeminiDDP(scenario.build(0), config):
        first, second = node.state().members
        assert first.job != second.job
        assert first.pid == second.pid


def test_ranks_without_a_common_name_are_refused(node: ServiceProcess) -> None:
    config = GeminiConfig(device="cpu", service=node.address)
    group: Any = SimpleNamespace(rank=0)
    with pytest.raises(ConfigError, match=r"GeminiConfig.job: expected a name that all 2 ranks share"):
        NodeMemory.connect(config, Sharding(group=group, node_ranks=(0, 1), stage=3))


def test_a_name_that_this_process_has_already_is_said(node: ServiceProcess) -> None:
    with node.client("job"), pytest.raises(ServiceError, match=r"rank 0 of job job is this process already: close"):
        node.client("job")


@pytest.mark.parametrize("host_budget", ["100MiB", "1GiB", None])
def test_what_was_kept_is_planned_with_the_budget_that_it_was_granted(
    host_budget: str | None, node: ServiceProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scenario = engine_job.PLACES["memory"]
    config = configuration("memory", node, tmp_path, snapshots=True, host_budget="200MiB")
    engine = GeminiDDP(scenario.build(0), config)
    Training(scenario, engine).train(1)
    engine.close(keep=True)
    with GeminiDDP(scenario.build(0), dataclasses.replace(config, host_budget=host_budget)) as engine:
        assert engine.recovered == 1
        assert engine.runtime.resources.ledger.budget_nbytes(MemoryTier.HOST) == 200 * MIB
    assert ("host budget of 200.00 MiB" in caplog.text) == (host_budget is not None)


def test_an_engine_that_is_forgotten_gives_its_memory_back(node: ServiceProcess, tmp_path: Path) -> None:
    scenario = engine_job.PLACES["disk"]
    engine = GeminiDDP(scenario.build(0), configuration("disk", node, tmp_path))
    Training(scenario, engine).train(1, commits=False)
    del engine
    gc.collect()
    wait_until(node.holds_nothing)


def test_only_the_frozen_weights_in_use_are_held(
    node: ServiceProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scenario, config = engine_job.PLACES["frozen"], configuration("frozen", node, tmp_path, snapshots=True)
    for step, (seed, warns) in enumerate(((0, False), (1, True), (1, False), (0, True)), start=1):
        caplog.clear()
        engine = GeminiDDP(scenario.build(seed), config)
        Training(scenario, engine).train(step)
        engine.close(keep=True)
        assert sum(chunk.num_users for chunk in node.state().shared) == 1
        assert ("frozen weights come from other files" in caplog.text) == warns


def test_a_job_that_does_not_want_what_is_kept_waits_for_room(node: ServiceProcess, tmp_path: Path) -> None:
    config = configuration("memory", node, tmp_path, snapshots=True, host_budget="600MiB")
    engine = GeminiDDP(engine_job.PLACES["memory"].build(0), config)
    engine.close(keep=True)
    with node.client("here") as client:
        waits = threading.Event()
        asking = threading.Thread(target=lambda: client.lease(500 * MIB, 0, on_wait=lambda reason: waits.set()))
        asking.start()
        assert waits.wait(PATIENCE_S)
        client.drop_kept()
        asking.join(PATIENCE_S)
        assert not asking.is_alive()


def test_a_kept_job_holds_the_room_of_its_frozen_weights(node: ServiceProcess, tmp_path: Path) -> None:
    scenario, config = engine_job.PLACES["frozen"], configuration("frozen", node, tmp_path, snapshots=True)
    engine = GeminiDDP(scenario.build(0), config)
    Training(scenario, engine).train(1)
    engine.close(keep=True)
    (chunk,), (row,) = node.state().shared, node.rows("here")
    assert (row.state, row.shared_nbytes, chunk.num_users) == ("kept", chunk.nbytes, 1)
    with node.client("other") as other:
        other.lease(other.budget().host_free, 0)
        with GeminiDDP(scenario.build(0), config) as engine:
            assert engine.recovered == 1
            assert node.state().shared[0].num_users == 1
    assert node.state().shared[0].num_users == 0


def test_other_frozen_weights_than_the_kept_ones_need_room(node: ServiceProcess, tmp_path: Path) -> None:
    scenario, config = engine_job.PLACES["frozen"], configuration("frozen", node, tmp_path, snapshots=True)
    engine = GeminiDDP(scenario.build(0), config)
    Training(scenario, engine).train(1)
    engine.close(keep=True)
    with node.client("other") as other:
        other.lease(other.budget().host_free, 0)
        with pytest.raises(OutOfTierMemoryError, match=r"frozen weights .* other jobs have ended; .* is kept"):
            GeminiDDP(scenario.build(1), config)
    with GeminiDDP(scenario.build(0), config) as engine:
        assert engine.recovered == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["memory", "mixed"])
def test_a_killed_job_goes_on_from_its_last_committed_step(place: str, node: ServiceProcess, tmp_path: Path) -> None:
    """It dies somewhere in its next steps, and the next one goes on."""
    choose, num_steps = random.Random(1), NUM_STEPS_A_LIFE * 7
    steps = [0]
    with job(node, "probe", place, tmp_path, "snapshots", "dies=0", num_steps=NUM_STEPS_A_LIFE) as process:
        num_events = int(process.communicate()[0].split()[-1])
    for _ in range(6):
        fate = f"dies={choose.randrange(1, num_events)}"
        with job(node, "job", place, tmp_path, "snapshots", fate, num_steps=num_steps) as process:
            said, _ = process.communicate()
            assert process.returncode == -9
        begin, *later = [int(line.split()[1]) for line in said.splitlines()]
        assert begin in (steps[-1], steps[-1] + 1)  # the last commit may have become complete as the process died
        steps.append([begin, *later][-1])
        wait_until(lambda: [row.state for row in node.rows("job")] == ["kept"])
        assert not any(path.name.startswith("step-") for path in tmp_path.iterdir())  # no checkpoint anywhere
    with job(node, "job", place, tmp_path, "snapshots", num_steps=num_steps) as process:
        process.communicate()
    assert 6 < steps[-1] < num_steps
    assert_same(result_of("job", tmp_path), uninterrupted(engine_job.PLACES[place], tmp_path, num_steps))
    wait_until(node.holds_nothing)


def test_an_exception_keeps_the_last_commit_and_the_end_drops_it(node: ServiceProcess, tmp_path: Path) -> None:
    scenario, config = engine_job.PLACES["memory"], configuration("memory", node, tmp_path, snapshots=True)

    def train(engine: GeminiDDP, end: int) -> Training:
        training = Training(scenario, engine)
        training.train(end)
        return training

    def fail() -> None:
        with GeminiDDP(scenario.build(0), config) as engine:
            train(engine, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [row.state for row in node.rows("here")] == ["kept"]
    with GeminiDDP(scenario.build(1), config) as engine:  # its first weights do not matter
        assert engine.recovered == 2
        assert_same(train(engine, NUM_STEPS).run, uninterrupted(scenario, tmp_path, NUM_STEPS))
    wait_until(node.holds_nothing)


def test_another_model_does_not_get_what_is_kept_and_leaves_it(node: ServiceProcess, tmp_path: Path) -> None:
    with GeminiDDP(
        engine_job.PLACES["memory"].build(0), configuration("memory", node, tmp_path, snapshots=True)
    ) as engine:
        Training(engine_job.PLACES["memory"], engine).train(1)
        engine.close(keep=True)
    other = torch.nn.Linear(8, 8)
    with pytest.raises(CheckpointMismatchError, match="python -m gemini evict here"):
        GeminiDDP(other, configuration("memory", node, tmp_path, snapshots=True))
    assert [row.state for row in node.rows("here")] == ["kept"]


@pytest.mark.slow
def test_the_service_s_death_under_load_changes_no_bit(node: ServiceProcess, tmp_path: Path) -> None:
    num_steps = 1

    def step() -> None:
        nonlocal num_steps
        process.stdin.write("\n")
        process.stdin.flush()
        num_steps += 1
        assert read_step(process) == num_steps

    def is_back() -> bool:
        step()
        return [row.state for row in node.rows("job")] == ["running"]

    with job(node, "job", "mixed", tmp_path, "snapshots", "held", num_steps=1_000_000) as process:
        assert [read_step(process) for _ in range(2)] == [0, 1]
        step()
        node.kill()
        step()
        node.start()
        wait_until(is_back)  # and it trains meanwhile
        assert node.state().disk.leased > 0
        step()
        process.communicate("end\n")
    assert_same(result_of("job", tmp_path), uninterrupted(engine_job.PLACES["mixed"], tmp_path, num_steps))
    wait_until(node.holds_nothing)


def test_a_service_that_is_not_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    config = GeminiConfig(device="cpu", service=f"unix:{tmp_path / 'none'}")
    with pytest.raises(ServiceError, match="python -m gemini serve"):
        GeminiDDP(torch.nn.Linear(4, 4), config)


@pytest.mark.parametrize("options", [{"service": "unix:/s"}, {"job": "a"}, {}])
def test_snapshots_need_a_service_and_a_name(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"GeminiConfig.snapshots: expected service= too"):
        GeminiConfig(snapshots=True, **options)


def test_other_frozen_weights_than_those_of_the_killed_run_are_said(
    node: ServiceProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scenario, config = engine_job.PLACES["frozen"], configuration("frozen", node, tmp_path, snapshots=True)

    def go_on(seed: int) -> None:
        with GeminiDDP(scenario.build(seed), config) as engine:
            Training(scenario, engine).train(1 if engine.recovered is None else engine.recovered + 1)
            engine.close(keep=True)

    for _ in range(2):
        go_on(seed=0)
    assert "frozen weights come from other files" not in caplog.text
    go_on(seed=1)
    assert "job here continues from its last commit, but its frozen weights come from other files" in caplog.text
