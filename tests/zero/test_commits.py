"""What ranks have committed together other ranks go on from, bit by bit."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from commit_cases import Outcome, be_interrupted, go_on, serve_rank
from fate import Fate, draw_fate, end_of, receive
from forking import fork_context
from patience import wait_until
from rank_pool import RankPool
from service_process import ServiceProcess, running_service

from gemini import StaticPlacement
from gemini.commits.file import CommitFile

pytestmark = pytest.mark.processes


NUM_STEPS = 5
NUM_KILLS = 20
NUM_STEPS_A_LIFE = 3
"""Each group of processes is killed within so many."""
MOST_STEPS = NUM_STEPS_A_LIFE * (NUM_KILLS + 1) + 2
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


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize(
    ("world_size", "fields"),
    [
        (2, {"stage": 1}),
        (2, {"stage": 2, "place": "nvme"}),
        (3, {"stage": 3, "place": "nvme", "overlap": "next-forward"}),
        (2, {"stage": 3, "place": "nvme", **MIXED}),
        (2, {"stage": 3, "model": "gpt2", "dtype": torch.bfloat16, "overlap": "next-forward"}),
        (2, {"stage": 3, "model": "gpt2", "frozen": "mlp"}),
        (2, {"stage": 3, "exchange": "host"}),
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


@pytest.mark.slow
@pytest.mark.parametrize("odd_rank", [0, 1])
@pytest.mark.parametrize(
    ("ending", "end", "expected_first"),
    [
        ("unpublished", 1, 0),
        ("unpublished", 3, 2),
        ("dropped", 3, 3),
        ("all dropped", 3, 0),
        ("dropped, unpublished", 3, 0),
    ],
)
def test_ranks_go_on_from_what_all_have(
    ending: str, end: int, expected_first: int, odd_rank: int, ranks: RankPool, node: ServiceProcess, tmp_path: Path
) -> None:
    case = {"model": "tower", "num_steps": NUM_STEPS, "directory": tmp_path, "place": "nvme", **MIXED}
    expected = ranks.run(2, go_on, end=NUM_STEPS, **case)
    ranks.run(2, go_on, end=end, ending=ending, odd_rank=odd_rank, **case, **served(node))
    for last, first in ((4, expected_first), (NUM_STEPS, 4)):  # another restart finds their files in step
        found = ranks.run(2, go_on, end=last, closes=last == NUM_STEPS, **case, **served(node))
        assert [begin for begin, _, _ in found] == [first] * 2
    assert_same(found, expected)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("keeps_file", [False, True])
def test_ranks_of_which_one_has_nothing_begin_afresh(
    keeps_file: bool, ranks: RankPool, node: ServiceProcess, tmp_path: Path
) -> None:
    """Its state was given up, or it was killed before its first commit."""
    case = {"model": "tower", "num_steps": NUM_STEPS, "directory": tmp_path}
    expected = ranks.run(2, go_on, end=NUM_STEPS, **case)
    ranks.run(2, go_on, end=2, **case, **served(node))
    with node.client("ranks", rank=1, num_ranks=2) as client:
        client.take_kept().lease.end()
    if keeps_file:
        clients = [node.client("ranks", rank=rank, num_ranks=2) for rank in (0, 1)]
        with ThreadPoolExecutor() as pool:
            holds = list(pool.map(lambda client: client.lease(1 << 20, 0), clients))
        CommitFile.create(holds[1].keep_file(1 << 20), 1 << 20).close()
        clients[0].close()
        clients[1].close(keep=True)
    found = ranks.run(2, go_on, end=NUM_STEPS, closes=True, **case, **served(node))
    assert [begin for begin, _, _ in found] == [0, 0]
    assert_same(found, expected)
    wait_until(node.holds_nothing)


def test_a_commit_of_which_a_rank_did_not_hear_the_end_is_its_last(
    ranks: RankPool, node: ServiceProcess, tmp_path: Path
) -> None:
    for first, second in ranks.run(2, be_interrupted, model="tower", directory=tmp_path, **served(node)):
        assert first.startswith("KeyboardInterrupt")
        assert second.startswith("ModelError")
        assert "the last commit was interrupted" in second


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_that_are_killed_go_on_together(ranks: RankPool, node: ServiceProcess, tmp_path: Path) -> None:
    """One is killed where it was drawn, and the others with it, as torchrun does."""
    world_size = 2
    context, choose = fork_context(), random.Random(3)
    case = {"model": "tower", "num_steps": MOST_STEPS, "directory": tmp_path, "place": "nvme", **MIXED}

    def live(end: int, fates: list[Fate | None]) -> tuple[int, list[Any]]:
        """Let ranks train; return the step they began after and what they said then, if they were not killed."""
        with tempfile.TemporaryDirectory() as rendezvous:
            pipes = [context.Pipe() for _ in range(world_size)]
            processes = []
            for rank, (_, theirs) in enumerate(pipes):
                arguments = {**case, **served(node), "end": end, "fate": fates[rank], "closes": end == MOST_STEPS}
                path = tmp_path / f"{rank}.pt"
                process = context.Process(
                    target=serve_rank, args=(rank, world_size, Path(rendezvous) / "file", theirs, path, arguments)
                )
                process.start()
                theirs.close()
                processes.append(process)
            (step,) = {receive(ours) for ours, _ in pipes}
            victim = next((rank for rank, fate in enumerate(fates) if fate is not None), None)
            if victim is None:
                said = [end_of(process, ours) for process, (ours, _) in zip(processes, pipes, strict=True)]
                assert [process.exitcode for process in processes] == [0] * world_size
                return step, said
            end_of(processes[victim], pipes[victim][0])
            assert processes[victim].exitcode == -9
            for process in processes:
                process.kill()
                process.join()
                assert process.exitcode != 0  # killed, or it has heard of the other's end before
            return step, []

    steps = [0]
    _, said = live(NUM_STEPS_A_LIFE, [None] * world_size)
    num_events = min(number for (number,) in said)
    for _ in range(NUM_KILLS):
        fates = [draw_fate(choose, num_events), *[None] * (world_size - 1)]
        choose.shuffle(fates)
        steps.append(live(MOST_STEPS - 1, fates)[0])
    steps.append(live(MOST_STEPS, [None] * world_size)[0])
    assert steps == sorted(steps)
    assert NUM_KILLS // 3 < steps[-1] < MOST_STEPS
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    assert_same(found, ranks.run(world_size, go_on, end=MOST_STEPS, **case))
    wait_until(node.holds_nothing)
