"""What ranks do in tests of other kinds of parallelism beside ours; importable in their processes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model_zoo import HIDDEN, Block, Tower, square
from rank_cases import case_of, cut_batch, global_batches
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from training_harness import config_for, hybrid_adam

import zero
from gemini import GeminiDDP

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
ZERO_BUBBLES = {"interleaved": ScheduleInterleavedZeroBubble, "zbv": ScheduleZBVZeroBubble}
NUM_HEADS = 2


class TowerStage(nn.Module):
    """A part of a tower, its parameters under the names they have in the whole."""

    def __init__(self, tower: Tower, index: int, num_stages: int = 2) -> None:
        super().__init__()
        num_blocks = len(tower.blocks) // num_stages
        self.blocks = nn.ModuleDict(
            {str(i): tower.blocks[i] for i in range(len(tower.blocks)) if i // num_blocks == index}
        )
        self.head = tower.head if index == num_stages - 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


def train_pipeline(
    *, schedule: str, place: str, directory: Path, num_micro: int, scale_grads: bool = False, num_steps: int = 3
) -> dict[str, torch.Tensor]:
    """Train the tower as a pipeline of two stages, each shared by half of the ranks; return this stage's weights."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "pipeline"))
    index, replica = mesh["pipeline"].get_local_rank(), mesh["data"].get_local_rank()
    num_replicas = mesh["data"].size()
    case = case_of("tower")
    own = directory / f"stage{index}"
    own.mkdir(exist_ok=True)
    with zero.shard(TowerStage(case.model(), index), config_for(place, own), mesh=mesh["data"]) as engine:
        optimizer = hybrid_adam(engine.parameters())
        stage = PipelineStage(engine, index, 2, torch.device("cpu"), group=mesh["pipeline"].get_group())
        divisor = 1 if scale_grads else num_micro
        pipeline = SCHEDULES[schedule](
            stage, num_micro, loss_fn=lambda output, _: square(output) / divisor, scale_grads=scale_grads
        )
        for batch in global_batches(case, num_steps, num_replicas * num_micro):
            rows = torch.stack([cut_batch(micro, replica, num_replicas)["x"] for micro in _micros(batch, num_micro)])
            whole = rows.flatten(0, 1)
            if index == 0:
                pipeline.step(whole)
            else:
                pipeline.step(target=whole)
            optimizer.step()
            optimizer.zero_grad()
        return engine.master_state_dict()


def train_zero_bubble(
    *, schedule: str, place: str, directory: Path, num_micro: int, stage: int | None = None, num_steps: int = 3
) -> dict[str, torch.Tensor]:
    """Train the tower as a pipeline of four stages on two ranks, of which each has two; return their weights.

    With `stage` each pipeline has a twin, and `zero.shard` shares each part between the two.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "pipeline"))
    rank, replica = mesh["pipeline"].get_local_rank(), mesh["data"].get_local_rank()
    num_replicas = mesh["data"].size()
    case = case_of("tower")
    indices = {"zbv": (rank, 3 - rank), "interleaved": (rank, rank + 2)}[schedule]
    with ExitStack() as stack:
        engines = []
        for index in indices:
            own = directory / f"stage{index}"
            own.mkdir(exist_ok=True)
            part, config = TowerStage(case.model(), index, 4), config_for(place, own)
            engine = (
                GeminiDDP(part, config) if stage is None else zero.shard(part, config, mesh=mesh["data"], stage=stage)
            )
            engines.append(stack.enter_context(engine))
        optimizers = [hybrid_adam(engine.parameters()) for engine in engines]
        group = mesh["pipeline"].get_group()
        stages = [
            PipelineStage(engine, index, 4, torch.device("cpu"), group=group)
            for engine, index in zip(engines, indices, strict=True)
        ]
        pipeline = ZERO_BUBBLES[schedule](
            stages, num_micro, loss_fn=lambda output, _: square(output) / num_micro, scale_grads=False
        )
        for batch in global_batches(case, num_steps, num_replicas * num_micro):
            rows = torch.stack([cut_batch(micro, replica, num_replicas)["x"] for micro in _micros(batch, num_micro)])
            whole = rows.flatten(0, 1)
            pipeline.step(*((whole,) if 0 in indices else ()), **({"target": whole} if 3 in indices else {}))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert all(param.grad is None for engine in engines for param in engine.parameters())
        return {name: weight for engine in engines for name, weight in engine.master_state_dict().items()}


def _micros(batch: dict[str, Any], num_micro: int) -> list[dict[str, Any]]:
    return [cut_batch(batch, micro, num_micro) for micro in range(num_micro)]


class Attention(nn.Module):
    """Attention of which each rank of a group computes some heads for all positions, and the rest for its own.

    Source: Jacobs et al. 2023 (DeepSpeed-Ulysses): one all-to-all before attention and one behind it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group = [group]  # not copied with the module
        self.inner = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.outer = nn.Linear(HIDDEN, HIDDEN)
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (
            self.inner(x).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        )  # 3, rows, heads, positions, width
        query, key, value = self._exchange(heads, split=2, join=3)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = self._exchange(attended, split=2, join=1)
        return self.block(x + self.outer(mixed.transpose(1, 2).flatten(2)))

    def _exchange(self, x: torch.Tensor, *, split: int, join: int) -> torch.Tensor:
        """Send each rank its part of one dimension, and join what all ranks send along another."""
        group = self.group[0]
        if group is None:
            return x
        num_ranks = group.size()
        parts = torch.stack(x.chunk(num_ranks, dim=split))
        counts = [1] * num_ranks
        return torch.cat(list(all_to_all_single_autograd(parts, counts, counts, group)), dim=join)


def attentions(group: dist.ProcessGroup | None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Attention(group) for _ in range(3)))


def train_sequences(*, stage: int, place: str, directory: Path | None, has_own_group: bool) -> dict[str, torch.Tensor]:
    """Train with each sequence cut into as many parts as there are ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group() if has_own_group else dist.group.WORLD
    with zero.shard(attentions(group), config_for(place, directory), stage=stage) as engine:
        return _train_on_sequences(engine, rank, world_size)


def train_sequences_alone() -> dict[str, torch.Tensor]:
    """Train one process on whole sequences."""
    with GeminiDDP(attentions(None), config_for("host")) as engine:
        return _train_on_sequences(engine, 0, 1)


def _train_on_sequences(engine: GeminiDDP, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    optimizer = hybrid_adam(engine.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        sequences = torch.randn(2, 8, HIDDEN, generator=generator)
        square(engine(sequences.chunk(world_size, dim=1)[rank])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.master_state_dict()
