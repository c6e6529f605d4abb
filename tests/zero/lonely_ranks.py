"""One rank does what all ranks must do together, while the others do something else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import case_of, cut_batch, global_batches
from training_harness import config_for, hybrid_adam

import zero

ACTIONS = {
    "state_dict": lambda engine, optimizer, path: engine.state_dict(),
    "master_state_dict": lambda engine, optimizer, path: engine.master_state_dict(),
    "optimizer.state_dict": lambda engine, optimizer, path: optimizer.state_dict(),
    "module.state_dict": lambda engine, optimizer, path: engine.module.state_dict(),
    "load_state_dict": lambda engine, optimizer, path: engine.load_state_dict(case_of("tower").model().state_dict()),
    "save_checkpoint": lambda engine, optimizer, path: engine.save_checkpoint(path / "run"),
    "load_checkpoint": lambda engine, optimizer, path: engine.load_checkpoint(path / "saved"),
    "clip": lambda engine, optimizer, path: engine.clip_grad_norm_(1.0),
    "barrier": lambda engine, optimizer, path: dist.barrier(),
    "all_reduce": lambda engine, optimizer, path: dist.all_reduce(torch.ones(1000)),
}


def act_alone(*, alone: str, meanwhile: str, stage: int, directory: Path) -> tuple[str, str, float]:
    """Train a step; then rank 0 does one thing and the others another.

    Args:
        alone: what rank 0 does, of ACTIONS.
        meanwhile: what the others do: one of these, "train" or "evaluate".
        stage: of the sharding.
        directory: for checkpoints.

    Returns:
        Type and text of the error, and the seconds until it came; a rank without one fails.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("tower")
    first, *others = [cut_batch(batch, rank, world_size) for batch in global_batches(case, 4, world_size)]
    with zero.shard(case.model(), config_for("host"), stage=stage) as engine:
        optimizer = hybrid_adam(engine.parameters())

        def train(batch: dict[str, Any]) -> None:
            case.loss(engine(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

        train(first)
        engine.save_checkpoint(directory / "saved")
        start_s = time.monotonic()
        try:
            if rank == 0:
                ACTIONS[alone](engine, optimizer, directory)
            elif meanwhile == "evaluate":
                with torch.no_grad():
                    engine(**others[0])
            elif meanwhile != "train":
                ACTIONS[meanwhile](engine, optimizer, directory)
            for batch in others:
                train(batch)
        except RuntimeError as error:
            return type(error).__name__, str(error), time.monotonic() - start_s
    raise AssertionError("the ranks have gone different ways, and nobody has noticed")


def mix_collectives(*, stage: int) -> dict[str, torch.Tensor]:
    """Train with collectives of the user's on the same ranks in between, under way while ours are; return weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("tower")
    with zero.shard(case.model(), config_for("host"), stage=stage) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for index, batch in enumerate(global_batches(case, 3, world_size)):
            sums = torch.ones(1000 + index)
            if rank == 0:
                under_way = dist.all_reduce(sums, async_op=True)
            loss = case.loss(engine(**cut_batch(batch, rank, world_size)))
            if rank != 0:
                under_way = dist.all_reduce(sums, async_op=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            under_way.wait()
            assert torch.equal(sums, torch.full_like(sums, world_size))
        return engine.master_state_dict()
