"""Ranks to which something happens."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import case_of, cut_batch, global_batches, mesh_of
from training_harness import config_for, hybrid_adam

import zero
from gemini import CollectiveError


def train_until_fault(
    *, fault: str, when: str, directory: Path, again: bool = False, mesh: tuple[int, ...] | None = None
) -> None:
    """Train four steps; in the second something happens to the last rank.

    Args:
        fault: "kill"; "stall"; "stray": run blocks in another order; "leave": close the engine; "skip": drop the step.
        when: "forward" or "backward", in the middle of it, or "step", just before it.
        directory: for the swap file.
        again: whether to train on after an error.
        mesh: its sizes; None: no mesh.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("tower")
    model = case.model()
    is_armed = False

    def strike(*_: Any) -> None:
        if not is_armed or rank != world_size - 1:
            return
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stall":
            signal.pause()

    if when == "forward":
        model.blocks[2].register_forward_pre_hook(strike)
    if when == "backward":
        model.blocks[1].register_full_backward_hook(strike)
    config = config_for("nvme", directory)
    with zero.shard(model, config, stage=3, mesh=mesh_of(*mesh) if mesh else None) as engine:
        optimizer = hybrid_adam(engine.parameters())
        before = None
        for i, batch in enumerate(global_batches(case, 4, world_size)):
            is_armed = i == 1
            if is_armed and fault == "leave" and rank == world_size - 1:
                return
            if is_armed and fault == "stray" and rank == world_size - 1:
                model.blocks = torch.nn.ModuleList([model.blocks[j] for j in (1, 0, 2, 3)])
            if is_armed and fault == "stray":
                before = engine.runtime.core.chunks[0].num_updates
            try:
                loss = case.loss(engine(**cut_batch(batch, rank, world_size)))
                if is_armed and fault == "skip" and rank == world_size - 1:
                    continue
                loss.backward()
                if when == "step":
                    strike()
                optimizer.step()
            except CollectiveError:
                if before is not None:
                    assert engine.runtime.core.chunks[0].num_updates == before
                if not again:
                    raise
                engine(**cut_batch(batch, rank, world_size))
            optimizer.zero_grad()


def build_on_ranks(*, fault: str | None, directory: Path | None = None) -> Any:
    """Build an engine in which something is different on the last rank; return its host budget and threads."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    place = "host" if directory is None else "nvme"
    fields: dict[str, Any] = {"num_threads": None}
    if fault == "config" and is_last:
        fields["tile_numel"] = 8192
    if fault == "speculative":
        fields["overlap"] = "speculative"
    if fault == "budget":
        fields["host_budget"] = "64MiB"
    if fault == "directory" and is_last:
        assert directory is not None
        directory = directory / "missing"
    case = case_of("gpt2" if fault == "model" and is_last else "tower")
    model = case.model(seed=1 if fault == "seed" and is_last else 0)
    init_fn = None
    if fault == "init_fn":
        model = model.to("meta")

        def init_fn(module: torch.nn.Module) -> None:
            for values in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                values.fill_(1 / (0 if is_last else 1))

    with zero.shard(model, config_for(place, directory, **fields), init_fn=init_fn) as engine:
        config = engine.runtime.config
        return config.host_budget, config.num_threads
