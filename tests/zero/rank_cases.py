"""What ranks do in tests; importable in their processes, and the same in one process for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_zoo import ZOO
from training_harness import Case, config_for, hybrid_adam

import zero
from gemini import GeminiDDP


def cut_batch(batch: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return a rank's rows of a global batch."""

    def rows(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        assert len(value) % world_size == 0
        return value.chunk(world_size)[rank]

    return {name: rows(value) for name, value in batch.items()}


def global_batches(case: Case, num_steps: int, num_parts: int) -> list[dict[str, Any]]:
    """Return batches that can be cut into a number of parts: as many of the case's own, one after the other."""
    parts = case.batches(num_steps * num_parts)
    joined = []
    for i in range(num_steps):
        group = parts[i * num_parts : (i + 1) * num_parts]
        joined.append(
            {
                name: torch.cat([part[name] for part in group]) if isinstance(value, torch.Tensor) else value
                for name, value in group[0].items()
            }
        )
    return joined


def train_sharded(
    *,
    model: str,
    stage: int,
    place: str,
    directory: Path | None = None,
    num_steps: int = 3,
    num_micro: int = 1,
    adam: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Train and return losses (the ranks' mean), norms, weights, bytes by tier."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = ZOO[model]
    config = config_for(place, directory, **fields)
    with zero.shard(case.model(), config, stage=stage) as engine:
        optimizer = hybrid_adam(engine.parameters(), **(adam or {}))
        losses, norms = [], []
        for batch in global_batches(case, num_steps, world_size * num_micro):
            loss_sum = torch.zeros((), dtype=torch.float64)
            for micro in range(num_micro):
                part = cut_batch(cut_batch(batch, micro, num_micro), rank, world_size)
                loss = case.loss(engine(**part)) / num_micro
                loss.backward()
                loss_sum += loss.detach().double()
            optimizer.step()
            optimizer.zero_grad()
            dist.all_reduce(loss_sum)
            losses.append(loss_sum.item() / world_size)
            norms.append(optimizer.last_grad_norm)
        return {"losses": losses, "norms": norms, "weights": engine.master_state_dict()}


def train_alone(
    *,
    model: str,
    world_size: int,
    place: str = "host",
    directory: Path | None = None,
    num_steps: int = 3,
    num_micro: int = 1,
    adam: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Train one process on the same global batches, the ranks' parts one after the other."""
    case = ZOO[model]
    with GeminiDDP(case.model(), config_for(place, directory, **fields)) as engine:
        optimizer = hybrid_adam(engine.parameters(), **(adam or {}))
        losses, norms = [], []
        for batch in global_batches(case, num_steps, world_size * num_micro):
            loss_sum = 0.0
            for micro in range(num_micro):
                for rank in range(world_size):
                    part = cut_batch(cut_batch(batch, micro, num_micro), rank, world_size)
                    loss = case.loss(engine(**part)) / (world_size * num_micro)
                    loss.backward()
                    loss_sum += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_sum)
            norms.append(optimizer.last_grad_norm)
        return {"losses": losses, "norms": norms, "weights": engine.master_state_dict()}
