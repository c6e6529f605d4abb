"""A process that is killed while it saves leaves a complete checkpoint, always."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import pytest
from fate import Fate, draw_fate, end_of, receive
from forking import fork_context
from runs import Training, training
from saver import KEEP_LAST, SCENARIO, save_again_and_again

from gemini.checkpoint.directory import complete_checkpoints

pytestmark = pytest.mark.processes


NUM_KILLS = 50
NUM_SAVES_A_LIFE = 4
"""Each process is killed within so many."""


def live(
    context: multiprocessing.context.ForkServerContext, directory: Path, fate: Fate | None
) -> tuple[int, int | None]:
    """Let a process save; return the step it began from, and how many calls and returns its saves took if it lived."""
    ours, theirs = context.Pipe()
    process = context.Process(target=save_again_and_again, args=(directory, theirs, fate, NUM_SAVES_A_LIFE))
    process.start()
    theirs.close()
    first = int(receive(ours))
    said = end_of(process, ours)
    assert process.exitcode == (0 if fate is None else -9)
    return first, said[0] if said else None


def check(run: Training, directory: Path) -> int:
    """Load every checkpoint that looks complete; return the last one's step."""
    found = complete_checkpoints(directory)
    assert 1 <= len(found) <= KEEP_LAST + 1
    for path in found:
        loaded = run.engine.load_checkpoint(path, scheduler=run.scheduler)
        assert loaded.extra["step"] == loaded.step == run.scheduler.last_epoch
    return loaded.step


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_leaves_a_complete_checkpoint_always(tmp_path: Path) -> None:
    context, choose = fork_context(), random.Random(0)
    directory = tmp_path / "run"
    num_caught = 0
    with training(SCENARIO, "host", tmp_path) as run:
        run.engine.save_checkpoint(directory, scheduler=run.scheduler, extra={"step": 0})
        first, num_events = live(context, directory, None)
        assert first == 0
        assert num_events is not None
        last = check(run, directory)
        assert last == NUM_SAVES_A_LIFE
        for _ in range(NUM_KILLS):
            assert live(context, directory, draw_fate(choose, num_events)) == (last, None)
            num_caught += any(directory.glob(".*"))
            step = check(run, directory)
            assert last <= step <= last + NUM_SAVES_A_LIFE
            last = step
        run.engine.save_checkpoint(directory, scheduler=run.scheduler, extra={"step": last}, keep_last=1)
    assert num_caught > NUM_KILLS // 5  # most kills come while something is being written
    assert last > NUM_KILLS // 2  # and that many saves were completed
    assert len(list(directory.iterdir())) == 1
