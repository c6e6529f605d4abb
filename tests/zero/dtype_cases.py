"""What ranks do with a model whose chunks have several dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from training_harness import config_for, hybrid_adam

import zero
from gemini import GeminiDDP


class Mixed(nn.Module):
    """Trained weights of two dtypes, a frozen float8 and a frozen int8 one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.router, self.down = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32)
        self.small = nn.Parameter(torch.randn(64, 64).to(torch.float8_e4m3fn), requires_grad=False)
        self.whole = nn.Parameter(torch.randint(-3, 3, (64, 64), dtype=torch.int8), requires_grad=False)
        self.register_buffer("shift", torch.rand(64))
        self._keep_in_fp32_modules_strict = ["router"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x) + self.shift
        hidden = hidden @ self.small.to(x.dtype) + hidden @ self.whole.to(x.dtype)
        return self.down(hidden * self.router(hidden.float()).tanh().to(x.dtype))  # type: ignore[no-any-return]


def train(engine: GeminiDDP) -> dict[str, Any]:
    """Train two steps on one batch, the same for all ranks."""
    optimizer = hybrid_adam(engine.parameters())
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        engine(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"working": engine.state_dict(), "masters": engine.master_state_dict()}


def train_mixed(*, stage: Literal[1, 2, 3] | None, place: str, directory: Path | None, **fields: Any) -> dict[str, Any]:
    """Train alone (no stage) or among ranks; return the weights, working and masters."""
    config = config_for(place, directory, dtype=torch.bfloat16, **fields)
    with GeminiDDP(Mixed(), config) if stage is None else zero.shard(Mixed(), config, stage=stage) as engine:
        return train(engine)
