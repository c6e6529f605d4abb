"""What ranks do that read and write weights by themselves, inside of forward and outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from training_harness import config_for, hybrid_adam

import zero
from gemini import GeminiDDP

W = 24


class Moving(nn.Module):
    """Clamps a temperature, moves a frozen table and renormalises a weight in forward; reads weights of its layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(3))
        self.temperature = nn.Parameter(torch.tensor(0.6))
        self.table = nn.Embedding(8, W).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.temperature.clamp_(0.1, 0.55)
            self.table.weight.mul_(0.75)
        for layer in self.layers:
            layer.bias.data.clamp_(-0.1, 0.1)
            x = torch.tanh(layer(x) + self.layers[0].weight[1])
        return x / self.temperature + self.table.weight.sum(0)


def train(engine: GeminiDDP) -> dict[str, Any]:
    """Train three steps on batches that all ranks share, and look at weights in between."""
    model: Any = engine.module
    optimizer = hybrid_adam(engine.parameters())
    kept = model.layers[1].weight.data
    seen: list[torch.Tensor] = []
    for step in range(3):
        x = torch.randn(4, W, generator=torch.Generator().manual_seed(step))
        loss = engine(x).float().square().mean() + 0.01 * sum(p.float().square().sum() for p in model.parameters())
        loss.backward()
        seen += [param.grad.clone() for param in model.parameters() if param.requires_grad]
        optimizer.step()
        optimizer.zero_grad()
        seen += [param.sum() for param in model.parameters()]
        with torch.no_grad():
            model.layers[step].weight[step] = 0.125
            kept.clamp_(-0.15, 0.15)
            model.layers[2].bias.copy_(torch.linspace(0, 0.1, W))
        seen += [kept.clone(), model.layers[2].state_dict()["weight"].clone()]
        model.layers[0].load_state_dict({name: value * 0.5 for name, value in model.layers[0].state_dict().items()})
    return {"seen": [value.detach() for value in seen], "masters": engine.master_state_dict()}


def train_moving(
    *, stage: Literal[1, 2, 3] | None, place: str, directory: Path | None, **fields: Any
) -> dict[str, Any]:
    """Train alone (no stage) or among ranks; return what was seen, and the masters."""
    config = config_for(place, directory, **fields)
    with GeminiDDP(Moving(), config) if stage is None else zero.shard(Moving(), config, stage=stage) as engine:
        return train(engine)
