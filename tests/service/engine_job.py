"""A job that trains with memory from a service, in a process that may be killed.

    python tests/service/engine_job.py ADDRESS JOB PLACE DIRECTORY NUM_STEPS [snapshots] [held | dies=N]

It says "step N" when it begins and after each step, and leaves losses and weights in DIRECTORY/JOB.pt. Held, it waits
for a line after each step, and "end" ends it. It dies at its N-th call or return; with N = 0 it says how many there
are.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

if __name__ == "__main__":
    for name in ("commits", "training", "support"):
        sys.path.insert(0, str(Path(__file__).parent.parent / name))

import torch
from committed_runs import DISK_MIXTURES, Scenario, Training
from fate import Fate, Fated

from gemini import GeminiDDP

CONFIG = {"overlap": "next-forward", "tile_numel": 8192}
PLACES = {
    "memory": Scenario(model="wide", config=CONFIG),
    "disk": Scenario("nvme", "wide", config=CONFIG),
    "mixed": Scenario("nvme", "wide", config={**CONFIG, "placement": DISK_MIXTURES["halves"]}),
    "device": Scenario("device", "wide", config=CONFIG),
    "frozen": Scenario(model="wide", trainable="2.", config=CONFIG),
    "frozen on a device": Scenario("device", "wide", trainable="2.", config=CONFIG),
}


def say(*words: object) -> None:
    print(*words, flush=True)


def main(address: str, job: str, place: str, directory: str, num_steps: str, *options: str) -> None:
    torch.set_num_threads(1)
    scenario, path = PLACES[place], Path(directory)
    fate = next((int(option.removeprefix("dies=")) for option in options if option.startswith("dies=")), None)
    fated = None if fate is None else Fated(Fate(fate) if fate else None)
    own = {"service": address, "job": job, "snapshots": "snapshots" in options}
    config = dataclasses.replace(scenario.configuration(path), **own)
    with GeminiDDP(scenario.build(0), config) as engine:
        training = Training(scenario, engine)
        say("step", training.step)
        if fated is not None:
            fated.begin()
        for step in range(training.step, int(num_steps)):
            training.train(step + 1, commits=config.snapshots)
            say("step", step + 1)
            if "held" in options and sys.stdin.readline() == "end\n":
                break
        num_events = None if fated is None else fated.end()
        torch.save(dataclasses.astuple(training.run), path / f"{job}.pt")
    say("end", num_events)


if __name__ == "__main__":
    main(*sys.argv[1:])
