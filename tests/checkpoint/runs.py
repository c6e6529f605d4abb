"""Runs that are saved half way and resumed. As a program: resume them all, in a process that knows nothing of them.

python tests/checkpoint/runs.py DIRECTORY
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

import torch
from model_zoo import ZOO
from torch import nn
from training_harness import PLACEMENTS, Case, Run, config_for, hybrid_adam

from gemini import GeminiDDP, HybridAdam

NUM_STEPS = 6
NUM_SAVED = 3
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Scenario:
    """What is trained, where, and how it is saved."""

    place: str = "host"
    resumed_place: str = ""
    """Where it is trained after it was resumed; empty: where it was before."""
    model: str = "gpt2"
    num_micro: int = 1
    wait: bool = True
    trainable: str = ""
    """Parameters whose names do not contain this are frozen."""
    with_frozen: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    adam: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        case = ZOO[self.model]

        def build() -> nn.Module:
            model = case.build()
            for name, param in model.named_parameters():
                param.requires_grad_(self.trainable in name)
            return model

        return dataclasses.replace(case, build=build)


def scenarios() -> dict[str, Scenario]:
    """Return all runs by name."""
    found = {}
    for (name, dtype), place in itertools.product(DTYPES.items(), PLACEMENTS):
        scale = {"initial_loss_scale": 2.0**18} if name == "fp16" else {}  # the first step overflows
        found[f"{name}-{place}"] = Scenario(place, config={"dtype": dtype, **scale})
    for place in ("nvme", "device", "mixed"):
        found[f"accumulated-{place}"] = Scenario(place, num_micro=2)
    for mode, wait in itertools.product(("off", "next-forward", "speculative"), (True, False)):
        adam = {"max_grad_norm": 10.0}  # seldom clips
        found[f"{mode}-{'waited' if wait else 'behind'}"] = Scenario(
            "nvme", wait=wait, config={"overlap": mode, "dtype": torch.bfloat16}, adam=adam
        )
    found["behind-mixed"] = Scenario("mixed", wait=False)
    found["clipped"] = Scenario("nvme", adam={"max_grad_norm": 0.1})
    found["dropout"] = Scenario("device", model="gpt2_dropout", wait=False)
    found["buffers"] = Scenario("mixed", model="conv_net")
    found["adapters"] = Scenario("mixed", trainable="attn", config={"dtype": torch.bfloat16})
    found["adapters-alone"] = Scenario("nvme", trainable="attn", with_frozen=False)
    for before, after in itertools.pairwise((*PLACEMENTS, PLACEMENTS[0])):
        found[f"{before}-to-{after}"] = Scenario(before, after, wait=False)
    return found


class Training:
    """A scenario under way: its engine, optimizer and scheduler."""

    def __init__(self, scenario: Scenario, engine: GeminiDDP, **adam: Any) -> None:
        self.scenario = scenario
        self.engine = engine
        self.optimizer: HybridAdam = hybrid_adam(engine.parameters(), **{**scenario.adam, **adam})
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.losses: list[float] = []
        self.norms: list[float | None] = []

    def train(self, begin: int, end: int) -> None:
        """Train on batches [begin, end) of the run."""
        case, num_micro = self.scenario.case, self.scenario.num_micro
        batches = case.batches(end * num_micro)
        for step in range(begin, end):
            for micro in batches[step * num_micro : (step + 1) * num_micro]:
                loss = case.loss(self.engine(**micro)) / num_micro
                loss.backward()
                self.losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.norms.append(self.optimizer.last_grad_norm)
            self.scheduler.step()

    def save(self, directory: Path) -> None:
        self.engine.save_checkpoint(
            directory,
            scheduler=self.scheduler,
            extra={"losses": self.losses},
            frozen=self.scenario.with_frozen,
            wait=self.scenario.wait,
        )

    @property
    def run(self) -> Run:
        state = self.optimizer.state_dict()["state"]
        moments = {f"{i} {key}": value for i, entry in state.items() for key, value in entry.items()}
        return Run(self.losses, self.engine.master_state_dict() | moments)


@contextmanager
def training(scenario: Scenario, place: str, swap: Path, *, seed: int = 0, **fields: Any) -> Iterator[Training]:
    """Yield a scenario at its beginning; `fields` are the engine's, but for "lr"."""
    adam = {"lr": fields.pop("lr")} if "lr" in fields else {}
    config = config_for(place, swap, **{**scenario.config, **fields})
    with GeminiDDP(scenario.case.model(seed), config) as engine:
        torch.manual_seed(2)
        yield Training(scenario, engine, **adam)


def resume(scenario: Scenario, directory: Path, swap: Path) -> Run:
    """Resume a saved scenario, starting from other weights, learning rate, random numbers and tiles."""
    seed = 7 if scenario.with_frozen else 0
    place = scenario.resumed_place or scenario.place
    with training(scenario, place, swap, seed=seed, lr=0.5, tile_numel=8192) as resumed:
        torch.manual_seed(99)
        found = resumed.engine.load_checkpoint(directory, scheduler=resumed.scheduler)
        resumed.losses += found.extra["losses"]
        resumed.train(NUM_SAVED, NUM_STEPS)
        return resumed.run


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    swap = directory / "swap"
    runs = {name: resume(scenario, directory / name, swap) for name, scenario in scenarios().items()}
    torch.save({name: (run.losses, run.weights) for name, run in runs.items()}, directory / "resumed.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
