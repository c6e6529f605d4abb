"""A process that saves again and again until it is killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import torch
from runs import Scenario, training

SCENARIO = Scenario(model="tower")
KEEP_LAST = 2


def save_for_ever(directory: Path, started: Connection) -> None:
    """Go on from the last checkpoint, if there is one; then step and save, half the time while training goes on."""
    torch.set_num_threads(1)
    with training(SCENARIO, "host", directory) as run:
        step = 0
        if any(directory.glob("step-*")):
            step = run.engine.load_checkpoint(directory, scheduler=run.scheduler).extra["step"]
        started.send(step)
        while True:
            step += 1
            run.train(step - 1, step)
            run.engine.save_checkpoint(
                directory, scheduler=run.scheduler, extra={"step": step}, keep_last=KEEP_LAST, wait=step % 2 == 0
            )
