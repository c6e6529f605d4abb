"""Train a model with Gemini and with plain torch, from the same seed on the same batches, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement

LR = 1e-3
WEIGHT_DECAY = 0.1
EPS = 1e-5
"""Larger than usual: where a gradient is exactly zero but for rounding (the bias of attention keys), Adam would blow
that rounding up to full steps, and no two implementations would agree."""

# Everything in compute memory; everything on disk; streamed to a device; each tier a share; all on the device.
PLACEMENTS = ("host", "nvme", "device", "mixed", "resident")


def config_for(place: str, tmp_path: Path | None = None, **fields: Any) -> GeminiConfig:
    """Return the configuration of a named placement; weights that are not resident share as few slots as possible.

    "below" has all weights in host memory, with copies of half of them on the device, and half of the state on disk.
    """
    nvme = NVMeConfig(path=tmp_path, budget="256MiB", direct=False) if tmp_path is not None else None
    chosen: dict[str, Any] = {
        "host": {"device": "cpu"},
        "nvme": {
            "device": "cpu",
            "nvme": nvme,
            "placement": StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1),
            "prefetch_depth": 0,
        },
        "device": {"device": "simulated", "placement": StaticPlacement(), "prefetch_depth": 1},
        "mixed": {
            "device": "simulated",
            "nvme": nvme,
            "placement": StaticPlacement(
                param_device=0.3, state_device=0.2, param_nvme=0.4, state_nvme=0.5, grad_nvme=0.5
            ),
            "prefetch_depth": 0,
        },
        "resident": {"device": "simulated", "placement": StaticPlacement(param_device=1, state_device=1)},
        "below": {
            "device": "simulated",
            "nvme": nvme,
            "placement": StaticPlacement(param_device=0.5, state_nvme=0.5),
            "prefetch_depth": 1,
        },
    }[place]
    sizes = {"device_budget": "128MiB"} if chosen["device"] == "simulated" else {}
    defaults = {"dtype": torch.float32, "host_budget": "256MiB", "tile_numel": 4096, "num_threads": 2, **sizes}
    defaults |= {"min_unit_nbytes": 0}  # so that embeddings, norms and heads of tiny models stream too
    return GeminiConfig(**{**defaults, **chosen, **fields})


@dataclass(frozen=True)
class Case:
    """A model and what it is fed."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], dict[str, torch.Tensor]]
    loss: Callable[[Any], torch.Tensor] = lambda output: output.loss

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().train()

    def batches(self, count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [self.batch(generator) for _ in range(count)]


@dataclass(frozen=True)
class Run:
    """What training gave."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    """Parameters (float32 masters) and persistent buffers, by name."""


def step(call: Callable[..., Any], optimizer: torch.optim.Optimizer, case: Case, batch: dict[str, Any]) -> float:
    """Train one step; return the loss."""
    loss = case.loss(call(**batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def plain_adamw(params: Iterable[Any], **fields: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, **{"lr": LR, "weight_decay": WEIGHT_DECAY, "eps": EPS, **fields})


def hybrid_adam(params: Iterable[Any], **fields: Any) -> HybridAdam:
    return HybridAdam(params, **{"lr": LR, "weight_decay": WEIGHT_DECAY, "eps": EPS, **fields})


def train_plain(case: Case, num_steps: int = 3) -> Run:
    model = case.model()
    optimizer = plain_adamw(model.parameters())
    torch.manual_seed(2)
    losses = [step(model, optimizer, case, batch) for batch in case.batches(num_steps)]
    return Run(losses, model.state_dict())


def train_gemini(case: Case, config: GeminiConfig, num_steps: int = 3) -> Run:
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        torch.manual_seed(2)
        losses = [step(engine, optimizer, case, batch) for batch in case.batches(num_steps)]
        return Run(losses, engine.master_state_dict())


@contextmanager
def engine_and_twin(case: Case, config: GeminiConfig) -> Iterator[tuple[GeminiDDP, nn.Module]]:
    """Yield an engine and a plain model with the same weights."""
    with GeminiDDP(case.model(), config) as engine:
        yield engine, case.model()


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the L2 norm of the difference of all floating-point tensors, relative to that of `expected`."""
    assert found.keys() == expected.keys()
    floats = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    differences = [found[name].double() - expected[name].double() for name in floats]
    return float(_norm(differences) / _norm(expected[name].double() for name in floats))


def _norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Return whether all tensors are equal, bit for bit."""
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def is_close(found: list[float], expected: list[float]) -> bool:
    """Return whether losses begin with the same bits and then differ by no more than AdamW's rounding explains."""
    return found[0] == expected[0] and all(abs(a - b) <= 1e-6 * abs(b) for a, b in zip(found, expected, strict=True))
