"""Small recorded runs, real and invented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, MemoryReport, NVMeConfig, StaticPlacement
from gemini.profile.description import ChunkDescription, RunDescription, TierDescription
from gemini.profile.recording import Recording

WIDTH = 96
NUM_LAYERS = 4
NUM_STEPS = 3


def config_for(place: str, directory: Path) -> GeminiConfig:
    """Return a configuration in which weights, state and gradients move: on disk, or between three tiers."""
    chosen: dict[str, Any] = {
        "disk": {"device": "cpu", "placement": StaticPlacement(param_nvme=1, state_nvme=1, grad_nvme=1)},
        "three tiers": {
            "device": "simulated",
            "device_budget": "16MiB",
            "placement": StaticPlacement(param_nvme=0.5, state_nvme=0.5, grad_nvme=0.5),
        },
    }[place]
    return GeminiConfig(
        dtype=torch.float32,
        host_budget="64MiB",
        nvme=NVMeConfig(path=directory, budget="16MiB", direct=False),
        tile_numel=4096,
        min_unit_nbytes=0,
        num_threads=2,
        **chosen,
    )


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)))


def train_step(engine: GeminiDDP, optimizer: HybridAdam) -> torch.Tensor:
    loss = engine(torch.ones(8, WIDTH)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def record(
    engine: GeminiDDP, directory: Path, *, after_step: Callable[[int], None] = lambda step: None, **options: Any
) -> tuple[MemoryReport, MemoryReport]:
    """Record some steps; return the reports before and after."""
    optimizer = HybridAdam(engine.parameters(), lr=1e-3)
    before = engine.memory_report()
    with engine.record(directory, **options) as recorder:
        for step in range(NUM_STEPS):
            loss = train_step(engine, optimizer)
            recorder.log(loss=loss, tokens=8)
            after_step(step)
        engine.runtime.finish_updates()
    return before, engine.memory_report()


def invented(num_chunks: int = 2) -> Recording:
    """Return a recording without events."""
    chunks = tuple(
        ChunkDescription(
            chunk_id=chunk_id,
            name=f"chunk {chunk_id} (<b>{chunk_id}</b> and 0 more)",
            unit_id=chunk_id + 1,
            nbytes=4096,
            is_trainable=True,
            is_resident=False,
            homes={"weights": {"nvme": 4096}, "state": {"nvme": 8192}, "gradients": {"host": 4096}},
        )
        for chunk_id in range(num_chunks)
    )
    return Recording(
        run=RunDescription(
            rank=0,
            began_ns=0,
            began_unix_s=0.0,
            compute_tier="host",
            dtype="float32",
            overlap="off",
            num_params=2048,
            num_slots=1,
            slot_nbytes=4096,
            units=("", *(f"layer.{chunk_id}" for chunk_id in range(num_chunks))),
            chunks=chunks,
            tiers=(TierDescription(tier="host", budget_nbytes=1 << 20, planned_nbytes={"slots": 4096}),),
            predicted=None,
        )
    )
