"""What ranks do in tests of tensor parallelism; importable in their processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from model_zoo import HIDDEN, square, vector_batch
from rank_cases import Fit, case_of, cut_batch, fit, global_batches
from rank_models import RANK_CASES
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from training_harness import Case, config_for, hybrid_adam, same_bits

import zero
from gemini import GeminiDDP


class Perceptron(nn.Module):
    """A block whose norm can be given a part of the sequence, so that the norm's gradients are partial sums."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Perceptrons(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Perceptron() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


RANK_CASES["perceptrons"] = Case(Perceptrons, vector_batch, square)


def plans_of(model: str) -> list[dict[str, Any]]:
    """Return how a case is divided, one plan after the other."""
    if model == "perceptrons":
        scatter = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))
        return [
            {"blocks.*.norm": scatter},
            {
                "blocks.*.norm": SequenceParallel(),
                "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
                "blocks.*.down": RowwiseParallel(),
            },
        ]
    layer = "model.layers.*"
    return [
        {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
            **{f"{layer}.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
            f"{layer}.self_attn.o_proj": RowwiseParallel(),
            f"{layer}.mlp.gate_proj": ColwiseParallel(),
            f"{layer}.mlp.up_proj": ColwiseParallel(),
            f"{layer}.mlp.down_proj": RowwiseParallel(),
            "lm_head": ColwiseParallel(output_layouts=Replicate()),
        }
    ]


@cache
def grid_of(*sizes: int) -> DeviceMesh:
    """Return a mesh of (dp, tp) or (replicate, shard, tp)."""
    names = ("dp", "tp") if len(sizes) == 2 else ("replicate", "shard", "tp")
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


@contextmanager
def divided(
    case: Case, model: str, sizes: tuple[int, ...], *, is_meta: bool = False, stage: int = 3, **fields: Any
) -> Iterator[GeminiDDP]:
    """Yield this rank's engine of a model that is divided over the last dimension of a grid."""
    grid = grid_of(*sizes)
    if is_meta:
        with torch.device("meta"):
            built = case.model()
    else:
        built = case.model()
    for plan in plans_of(model):
        parallelize_module(built, grid["tp"], plan)
    config = config_for(fields.pop("place", "host"), fields.pop("directory", None), **fields)
    mesh = grid["dp"] if len(sizes) == 2 else grid["replicate", "shard"]
    with zero.shard(built, config, stage=stage, mesh=mesh) as engine:
        yield engine


def batch_place(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Return which part of a global batch this rank trains on, and how many parts there are."""
    num_parts = 1
    part = 0
    for size, place in zip(sizes[:-1], grid_of(*sizes).get_coordinate()[:-1], strict=True):
        part, num_parts = part * size + place, num_parts * size
    return part, num_parts


def train_divided(
    *,
    model: str,
    sizes: tuple[int, ...],
    num_steps: int = 3,
    num_micro: int = 1,
    adam: dict[str, Any] | None = None,
    **fields: Any,
) -> Fit:
    """Train this rank's part."""
    case = case_of(model)
    part, num_parts = batch_place(sizes)
    with divided(case, model, sizes, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters(), **(adam or {}))
        batches = global_batches(case, num_steps, num_parts * num_micro)
        return fit(engine, optimizer, case, batches, rank=part, world_size=num_parts, num_micro=num_micro)


def overflow_on_last_tensor_rank(*, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Train two float16 steps; in the first one rank's part of one gradient overflows."""
    case = case_of("perceptrons")
    part, num_parts = batch_place(sizes)
    batches = [cut_batch(batch, part, num_parts) for batch in global_batches(case, 2, num_parts)]
    coordinate = grid_of(*sizes).get_coordinate()
    is_last = list(coordinate) == [size - 1 for size in sizes]
    with divided(case, "perceptrons", sizes, dtype=torch.float16, place="device") as engine:
        optimizer = hybrid_adam(engine.parameters())
        before = engine.master_state_dict()
        kept = []
        for i, batch in enumerate(batches):
            if i == 0 and is_last:
                weight = engine.module.blocks[1].up.weight
                handle = weight.register_hook(lambda grad: grad * float("inf"))
            case.loss(engine(**{name: value.half() for name, value in batch.items()})).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 0 and is_last:
                handle.remove()
            kept.append(same_bits(engine.master_state_dict(), before))
        assert engine.runtime.coming.scaler is not None
        return {
            "num_skipped": engine.runtime.steps.num_skipped_steps,
            "kept": kept,
            "scale": engine.runtime.coming.scaler.scale,
            "weights": engine.master_state_dict(),
        }


def save_and_load_divided(*, sizes: tuple[int, ...], directory: Path | None = None) -> dict[str, Any]:
    """Train two steps, save, train one more; load what was saved into a new engine and train that step again."""
    case = case_of("llama")
    part, num_parts = batch_place(sizes)
    batches = global_batches(case, 3, num_parts)
    fields = {"place": "nvme" if directory else "host", "directory": directory}

    def go_on(engine: GeminiDDP, optimizer: Any, span: slice) -> Fit:
        return fit(engine, optimizer, case, batches[span], rank=part, world_size=num_parts)

    with divided(case, "llama", sizes, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        go_on(engine, optimizer, slice(2))
        saved = {"model": engine.master_state_dict(), "optimizer": optimizer.state_dict()}
        shown = engine.module.state_dict()
        if directory is not None:
            engine.module.save_pretrained(directory / "saved")
        through = go_on(engine, optimizer, slice(2, 3))
    with divided(case, "llama", sizes, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        go_on(engine, optimizer, slice(1))  # to be overwritten
        engine.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        again = go_on(engine, optimizer, slice(2, 3))
    return {"saved": saved, "shown": shown, "through": through.weights, "again": again.weights}


def save_checkpoint_divided(*, sizes: tuple[int, ...], directory: Path) -> Fit:
    """Train two steps, save a checkpoint, train one more; return what that gave."""
    case = case_of("llama")
    part, num_parts = batch_place(sizes)
    batches = global_batches(case, 3, num_parts)
    with divided(case, "llama", sizes) as engine:
        optimizer = hybrid_adam(engine.parameters())
        fit(engine, optimizer, case, batches[:2], rank=part, world_size=num_parts)
        engine.save_checkpoint(directory)
        return fit(engine, optimizer, case, batches[2:], rank=part, world_size=num_parts)


def resume_checkpoint_divided(*, sizes: tuple[int, ...], directory: Path) -> dict[str, Any]:
    """Return what a fresh engine of other first values holds after loading a checkpoint, and after one more step."""
    case = case_of("llama")
    part, num_parts = batch_place(sizes)
    with divided(case, "llama", sizes) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine.load_state_dict({name: value + 1 for name, value in engine.master_state_dict().items()})
        engine.load_checkpoint(directory)
        loaded = {"model": engine.master_state_dict(), "optimizer": optimizer.state_dict()["state"]}
        last = global_batches(case, 3, num_parts)[2:]
        through = fit(engine, optimizer, case, last, rank=part, world_size=num_parts)
    return {"loaded": loaded, "through": through}


def refusal_of(*, fault: str) -> None:
    """Build an engine of a model in which something is wrong."""
    along_tp, along_dp = grid_of(1, 2), grid_of(2, 1)
    torch.manual_seed(0)
    block = Perceptron()
    if fault == "uneven":
        block.up = nn.Linear(HIDDEN, 33)

    def divide(name: str, mesh: DeviceMesh, placement: Placement) -> None:
        module = block.get_submodule(name)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [placement]))

    if fault == "seed":
        nn.init.constant_(block.down.weight, along_tp.get_local_rank("tp"))
    divide("norm", along_tp["tp"], Replicate())
    if fault == "partial":
        block.up.weight = nn.Parameter(DTensor.from_local(block.up.weight.detach(), along_tp["tp"], [Partial()]))
    elif fault == "two dimensions":
        whole = block.up.weight.detach()
        block.up.weight = nn.Parameter(distribute_tensor(whole, along_tp, [Shard(1), Shard(0)]))
    elif fault == "two meshes":
        divide("up", along_dp["dp"], Shard(0))
    else:
        divide("up", along_tp["tp"], Shard(0))
    if fault == "no zero":
        GeminiDDP(block, config_for("host"))
    mesh = {"no mesh": None, "same mesh": along_dp["dp"]}.get(fault, along_tp["dp"])
    zero.shard(block, config_for("host"), mesh=mesh).close()
