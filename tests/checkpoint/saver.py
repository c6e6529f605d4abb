"""A process that saves again and again until it is killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch
from fate import Fate, Fated
from runs import Scenario, training

SCENARIO = Scenario(model="tower")
KEEP_LAST = 2


def save_again_and_again(directory: Path, parent: Connection, fate: Fate | None, num_saves: int) -> None:
    """Go on from the last checkpoint, if there is one; then step and save, half the time while training goes on.

    Until it is killed; without a fate a number of times.
    """
    torch.set_num_threads(1)
    fated = Fated(fate, parent.send, parent.recv)
    with training(SCENARIO, "host", directory) as run:
        step = 0
        if any(directory.glob("step-*")):
            step = run.engine.load_checkpoint(directory, scheduler=run.scheduler).extra["step"]
        parent.send(step)
        fated.begin()
        end = step + num_saves
        while fate is not None or step < end:
            step += 1
            run.train(step - 1, step)
            run.engine.save_checkpoint(
                directory, scheduler=run.scheduler, extra={"step": step}, keep_last=KEEP_LAST, wait=step % 2 == 0
            )
            fated.end_step()
        parent.send(fated.end())
