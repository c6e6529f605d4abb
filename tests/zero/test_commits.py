"""What ranks have committed together other ranks go on from, bit by bit."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commit_cases import Outcome, go_on, serve_rank
from forking import fork_context
from rank_pool import Failure, RankPool
from service_process import ServiceProcess, running_service, wait_until

from gemini import StaticPlacement

NUM_STEPS = 5
NUM_KILLS = 20
MIXED = {"placement": StaticPlacement(param_nvme=0.5, state_nvme=0.7, grad_nvme=0.5), "prefetch_depth": 0}


@pytest.fixture
def node() -> Iterator[ServiceProcess]:
    with running_service(host="2GiB", disk="1GiB") as service:
        yield service


def served(node: ServiceProcess) -> dict[str, Any]:
    return {"service": node.address, "job": "ranks", "snapshots": True}


def assert_same(found: list[Outcome], expected: list[Outcome]) -> None:
    for (_, losses, weights), (_, all_losses, all_weights) in zip(found, expected, strict=True):
        assert losses == all_losses
        assert weights.keys() == all_weights.keys()
        for name, value in all_weights.items():
            assert torch.equal(weights[name], value), name


@pytest.mark.parametrize(
    ("world_size", "fields"),
    [
        (2, {"stage": 1}),
        (2, {"stage": 2, "place": "nvme"}),
        (3, {"stage": 3, "place": "nvme", "overlap": "next-forward"}),
        (2, {"stage": 3, "place": "nvme", **MIXED}),
        (2, {"stage": 3, "model": "gpt2", "dtype": torch.bfloat16, "overlap": "next-forward"}),
        (2, {"stage": 3, "model": "gpt2", "frozen": "mlp"}),
        (4, {"stage": 3, "mesh": (2, 2)}),
    ],
)
def test_ranks_go_on_where_others_were_closed(
    world_size: int, fields: dict[str, Any], ranks: RankPool, node: ServiceProcess, tmp_path: Path
) -> None:
    case = {"model": "tower", "num_steps": NUM_STEPS, "directory": tmp_path, **fields}
    expected = ranks.run(world_size, go_on, end=NUM_STEPS, **case)
    for begin, end in ((0, 2), (2, 3), (3, NUM_STEPS)):
        found = ranks.run(world_size, go_on, end=end, closes=end == NUM_STEPS, **case, **served(node))
        assert [first for first, _, _ in found] == [begin] * world_size
    assert_same(found, expected)
    wait_until(node.holds_nothing)


@pytest.mark.parametrize("unpublished", [0, 1])
@pytest.mark.parametrize("end", [1, 3])
def test_a_step_that_one_rank_has_not_committed_is_dropped_on_all(
    end: int, unpublished: int, ranks: RankPool, node: ServiceProcess, tmp_path: Path
) -> None:
    case = {"model": "tower", "num_steps": NUM_STEPS, "directory": tmp_path, "place": "nvme", **MIXED}
    expected = ranks.run(2, go_on, end=NUM_STEPS, **case)
    ranks.run(2, go_on, end=end, unpublished=unpublished, **case, **served(node))
    found = ranks.run(2, go_on, end=NUM_STEPS, closes=True, **case, **served(node))
    assert [first for first, _, _ in found] == [end - 1] * 2
    assert_same(found, expected)


def test_ranks_that_have_committed_other_steps_are_told_so(
    ranks: RankPool, node: ServiceProcess, tmp_path: Path
) -> None:
    case = {"model": "tower", "num_steps": NUM_STEPS, "directory": tmp_path, **served(node)}
    ranks.run(2, go_on, end=2, **case)
    with node.client("ranks", rank=1, num_ranks=2) as client:
        client.take_kept()
    failures = ranks.try_run(2, go_on, end=3, **case)
    for failure in failures:
        assert isinstance(failure, Failure)
        assert failure.type_name == "CheckpointMismatchError"
        assert "keeps what some ranks of job ranks committed" in failure.message
        assert "python -m gemini evict ranks" in failure.message


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_that_are_killed_go_on_together(
    ranks: RankPool, node: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed at a random moment, and the others with it, as torchrun does."""
    num_steps, world_size = 60, 2
    context, choose = fork_context(monkeypatch), random.Random(3)
    case = {"model": "tower", "num_steps": num_steps, "directory": tmp_path, "place": "nvme", **MIXED}
    steps = [0]
    for number in range(NUM_KILLS + 1):
        with tempfile.TemporaryDirectory() as rendezvous:
            pipes = [context.Pipe() for _ in range(world_size)]
            arguments = {**case, **served(node), "end": num_steps, "closes": True}
            processes = [
                context.Process(
                    target=serve_rank,
                    args=(rank, world_size, Path(rendezvous) / "file", theirs, tmp_path / f"{rank}.pt", arguments),
                )
                for rank, (_, theirs) in enumerate(pipes)
            ]
            for process in processes:
                process.start()
            for ours, theirs in pipes:
                theirs.close()
                assert ours.poll(60)
            (step,) = {ours.recv() for ours, _ in pipes}
            steps.append(step)
            if number < NUM_KILLS:
                time.sleep(choose.uniform(0, 0.1))
                choose.shuffle(processes)
                for process in processes:
                    process.kill()
                    time.sleep(choose.choice((0, 0.005)))
            for process in processes:
                process.join()
                assert process.exitcode == (-9 if number < NUM_KILLS else 0)
    assert steps == sorted(steps)
    assert 5 < steps[-1] < num_steps
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    assert_same(found, ranks.run(world_size, go_on, end=num_steps, **case))
    wait_until(node.holds_nothing)
