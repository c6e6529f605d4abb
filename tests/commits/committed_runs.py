"""Runs that commit each step, and go on in another process from what a killed one has left.

As a program: python tests/commits/committed_runs.py DESCRIPTOR SCENARIO DIRECTORY NUM_STEPS [held]
"""

from __future__ import annotations

import os
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
from training_harness import Case, Run, config_for, hybrid_adam

from gemini import GeminiConfig, GeminiDDP, HybridAdam, StaticPlacement
from gemini.assembly.blueprint import draw_blueprint
from gemini.commits.file import CommitFile

NUM_STEPS = 6
DISK_MIXTURES = {
    "state": StaticPlacement(state_nvme=1),
    "weights": StaticPlacement(param_nvme=1, state_nvme=0.5),
    "gradients": StaticPlacement(grad_nvme=1),
    "halves": StaticPlacement(param_nvme=0.5, state_nvme=0.7, grad_nvme=0.5),
}


def _wide_batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input": torch.randn(1, 512, generator=generator)}


WIDE = Case(
    lambda: torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 512)),
    _wide_batch,
    loss=lambda output: output.square().mean(),
)
"""A model whose update takes as long as all the rest of a step."""


@dataclass(frozen=True)
class Scenario:
    """What is trained, and where."""

    place: str = "host"
    model: str = "tower"
    num_micro: int = 1
    num_groups: int = 1
    trainable: str = ""
    """Parameters whose names do not contain this are frozen."""
    config: dict[str, Any] = field(default_factory=dict)
    adam: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        return WIDE if self.model == "wide" else ZOO[self.model]

    def configuration(self, directory: Path) -> GeminiConfig:
        return config_for(self.place, directory, **self.config)

    def build(self, seed: int) -> torch.nn.Module:
        model = self.case.model(seed)
        for name, param in model.named_parameters():
            param.requires_grad_(self.trainable in name)
        return model


def scenarios() -> dict[str, Scenario]:
    """Return all runs by name."""
    found = {}
    for place in ("host", "nvme", "device"):
        for mode in ("off", "next-forward"):
            found[f"{place}-{mode}"] = Scenario(place, config={"overlap": mode})
    for name, device_budget in (("all", "128MiB"), ("some", "400KiB")):
        place = {"placement": "auto", "device_budget": device_budget, "activation_reserve": 1}
        found[f"device-holds-{name}"] = Scenario("device", model="gpt2", config=place)
    for name, placement in DISK_MIXTURES.items():
        place = {"placement": placement, "prefetch_depth": 0, "overlap": "next-forward"}
        found[f"disk-{name}"] = Scenario("nvme", config=place)
        found[f"disk-{name}-bf16"] = Scenario("nvme", model="gpt2", config={**place, "dtype": torch.bfloat16})
    found["bf16"] = Scenario(model="gpt2", config={"dtype": torch.bfloat16})
    scale = {"dtype": torch.float16, "initial_loss_scale": 2.0**18}  # the first step overflows
    found["fp16-skips"] = Scenario("nvme", model="gpt2", config=scale)
    found["accumulated"] = Scenario("nvme", num_micro=2, config={"overlap": "next-forward"})
    found["clipped"] = Scenario(adam={"max_grad_norm": 0.1}, config={"overlap": "next-forward"})
    found["groups"] = Scenario(num_groups=2, config={"overlap": "next-forward"})
    found["dropout"] = Scenario("device", model="gpt2_dropout")
    found["buffers"] = Scenario("nvme", model="conv_net")
    found["adapters"] = Scenario("nvme", model="gpt2", trainable="attn")
    return found


class Training:
    """A scenario under way: its engine, optimizer and scheduler."""

    def __init__(self, scenario: Scenario, engine: GeminiDDP) -> None:
        self.scenario = scenario
        self.engine = engine
        params = [param for param in engine.parameters() if param.requires_grad]
        groups = [
            {"params": params[number :: scenario.num_groups], "lr": 1e-3 * (number + 1)}
            for number in range(scenario.num_groups)
        ]
        self.optimizer: HybridAdam = hybrid_adam(groups, **scenario.adam)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, [lambda step: 1 / (1 + step)] * scenario.num_groups
        )
        self.step = 0
        self.losses: list[float] = []
        if engine.recovered is not None:
            extra = engine.recover(scheduler=self.scheduler).extra
            self.step, self.losses = extra["step"], extra["losses"]

    def train(self, end: int, *, commits: bool = True) -> None:
        """Train up to a step."""
        case, num_micro = self.scenario.case, self.scenario.num_micro
        batches = case.batches(end * num_micro)
        while self.step < end:
            for micro in batches[self.step * num_micro : (self.step + 1) * num_micro]:
                loss = case.loss(self.engine(**micro)) / num_micro
                loss.backward()
                self.losses.append(loss.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.step += 1
            if commits:
                self.commit()

    def commit(self) -> None:
        self.engine.commit(scheduler=self.scheduler, extra={"step": self.step, "losses": self.losses})

    @property
    def run(self) -> Run:
        state = self.optimizer.state_dict()["state"]
        moments = {f"{i} {key}": value for i, entry in state.items() for key, value in entry.items()}
        return Run(self.losses, self.engine.master_state_dict() | moments)


def commit_nbytes(scenario: Scenario, directory: Path) -> int:
    """Return the length of the commit file that a scenario needs."""
    blueprint = draw_blueprint(scenario.build(0), scenario.configuration(directory), has_commits=True)
    assert blueprint.commits is not None
    return blueprint.commits.nbytes


@contextmanager
def memory_file(scenario: Scenario, directory: Path) -> Iterator[int]:
    """Yield a descriptor of a new commit file, which this process holds."""
    descriptor = os.memfd_create("commits")
    CommitFile.create(descriptor, commit_nbytes(scenario, directory)).close()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def attached(scenario: Scenario, directory: Path, descriptor: int, *, seed: int = 0) -> Iterator[Training]:
    """Yield a scenario where the file says it is; at its beginning if the file says nothing."""
    file = CommitFile.open(descriptor)
    with GeminiDDP(scenario.build(seed), scenario.configuration(directory), commits=file) as engine:
        torch.manual_seed(2)
        yield Training(scenario, engine)


def uninterrupted(scenario: Scenario, directory: Path, num_steps: int = NUM_STEPS) -> Run:
    """Return what training without commits gives."""
    with GeminiDDP(scenario.build(0), scenario.configuration(directory)) as engine:
        torch.manual_seed(2)
        training = Training(scenario, engine)
        training.train(num_steps, commits=False)
        return training.run


def main(descriptor: int, name: str, directory: Path, num_steps: int, *options: str) -> None:
    """Go on up to a step and save what came of it, or, held, wait to be killed there; say each step."""
    torch.set_num_threads(1)
    with attached(scenarios()[name], directory, descriptor) as training:
        print(training.step, flush=True)
        while training.step < num_steps:
            training.train(training.step + 1)
            print(training.step, flush=True)
        if "held" in options:
            sys.stdin.read()
        torch.save((training.run.losses, training.run.weights), directory / "run.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
