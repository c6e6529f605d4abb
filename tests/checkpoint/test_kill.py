"""A process that is killed while it saves leaves a complete checkpoint, always."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
from forking import fork_context
from runs import Training, training
from saver import KEEP_LAST, SCENARIO, save_for_ever

from gemini.checkpoint.directory import complete_checkpoints

NUM_KILLS = 50
FIRST_LONGEST_S = 0.25
"""A save of this model takes a fifth of that, on a machine that does nothing else."""


def kill_one(context: multiprocessing.context.ForkServerContext, directory: Path, after_s: float) -> int:
    """Start a process, kill it a while after it has begun to save, and return the step that it began from."""
    ours, theirs = context.Pipe()
    process = context.Process(target=save_for_ever, args=(directory, theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    first = int(ours.recv())
    time.sleep(after_s)
    process.kill()
    process.join()
    assert process.exitcode == -9
    return first


def check(run: Training, directory: Path) -> int:
    """Load every checkpoint that looks complete; return the last one's step."""
    found = complete_checkpoints(directory)
    assert 1 <= len(found) <= KEEP_LAST + 1
    for path in found:
        loaded = run.engine.load_checkpoint(path, scheduler=run.scheduler)
        assert loaded.extra["step"] == loaded.step == run.scheduler.last_epoch
    return loaded.step


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_process_leaves_a_complete_checkpoint_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = fork_context(monkeypatch)
    delays = random.Random(0)
    directory = tmp_path / "run"
    last, num_caught, longest_s = 0, 0, FIRST_LONGEST_S
    with training(SCENARIO, "host", tmp_path) as run:
        run.engine.save_checkpoint(directory, scheduler=run.scheduler, extra={"step": 0})
        for _ in range(NUM_KILLS):
            assert kill_one(context, directory, delays.uniform(0, longest_s)) == last
            num_caught += any(directory.glob(".*"))
            step = check(run, directory)
            assert step >= last
            longest_s *= 0.9 if step > last else 2.0  # as long as saves take here, now
            last = step
        run.engine.save_checkpoint(directory, scheduler=run.scheduler, extra={"step": last}, keep_last=1)
    assert num_caught > NUM_KILLS // 5  # most kills come while something is being written
    assert last > NUM_KILLS // 2  # and that many saves were completed
    assert len(list(directory.iterdir())) == 1
