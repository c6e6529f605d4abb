"""A group of one rank runs all that several ranks run, and must give the bits of an engine that shares nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_zoo import ZOO
from training_harness import Run, config_for, hybrid_adam, same_bits, step

import zero
from gemini import ConfigError, GeminiConfig, GeminiDDP
from gemini.ranks.one_rank import ALONE
from gemini.ranks.sharding import Sharding
from zero.torch_group import TorchGroup

CASE = ZOO["gpt2"]


@pytest.fixture(params=[pytest.param("nccl", marks=pytest.mark.gpu), "gloo"])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TorchGroup]:
    device = torch.device("cuda", 0) if request.param == "nccl" else torch.device("cpu")
    dist.init_process_group(request.param, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield TorchGroup(None, device)
    dist.destroy_process_group()


def train(config: GeminiConfig, group: TorchGroup, stage: int) -> Run:
    with GeminiDDP(CASE.model(), config, sharding=Sharding(group=group, node_ranks=(0,), stage=stage)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        torch.manual_seed(2)
        losses = [step(engine, optimizer, CASE, move(batch, engine)) for batch in CASE.batches(3)]
        return Run(losses, engine.master_state_dict())


def move(batch: dict[str, Any], engine: GeminiDDP) -> dict[str, Any]:
    device = engine.runtime.resources.transfers.device
    return {name: value.to(device) for name, value in batch.items()}


def on_device(place: str, tmp_path: Path, **fields: Any) -> GeminiConfig:
    """Return the configuration of a place, on the GPU if that is what the group is for."""
    if dist.get_backend() == "nccl":
        fields |= {"device": "cuda"}
    return config_for(place, tmp_path, **fields)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("place", ["device", "mixed", "resident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_rank_trains_with_the_bits_of_none(dtype, place, stage, group: TorchGroup, tmp_path):
    config = on_device(place, tmp_path, dtype=dtype)
    found = train(config, group, stage)
    with GeminiDDP(CASE.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        torch.manual_seed(2)
        losses = [step(engine, optimizer, CASE, move(batch, engine)) for batch in CASE.batches(3)]
        weights = engine.master_state_dict()
    if dtype is torch.float32:
        assert found.losses == losses
        assert same_bits(found.weights, weights)
    else:  # a tied weight's two gradients are added by autograd in bfloat16, not at home in float32
        assert found.losses == pytest.approx(losses, rel=1e-3)


def test_shard_with_one_rank_is_a_plain_engine(group: TorchGroup):
    with zero.shard(CASE.model(), config_for("host")) as engine:
        assert engine.runtime.sharding is ALONE


def test_shard_without_a_process_group_says_what_to_call():
    with pytest.raises(ConfigError, match="call torch.distributed.init_process_group first"):
        zero.shard(CASE.model(), config_for("host"))
