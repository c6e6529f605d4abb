"""`shard`: GeminiDDP over all ranks of a process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gemini.assembly.admission import refuse_foreign
from gemini.assembly.first_values import InitFn
from gemini.config import GeminiConfig
from gemini.ddp import GeminiDDP
from gemini.errors import ConfigError, GeminiError, OutOfTierMemoryError
from gemini.offload.resources import device_of
from gemini.ranks.sharding import ShardGroup, Sharding
from zero.agreement import check_all_built, check_same_config, check_same_model, find_node_ranks, share_node
from zero.frozen import open_frozen_file
from zero.host_meeting import choose_host_memory
from zero.tensor_mesh import check_grid, find_tensor_mesh
from zero.torch_group import TorchGroup

__all__ = ["shard"]


def shard(
    model: torch.nn.Module,
    config: GeminiConfig | None = None,
    *,
    stage: Literal[1, 2, 3] = 3,
    mesh: DeviceMesh | None = None,
    init_fn: InitFn | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> GeminiDDP:
    """Wrap a model as GeminiDDP does, divided among the ranks of a process group. Every rank calls it.

    Each rank of the mesh trains on its own batches; gradients are the mean over these, and losses are the rank's own.
    All ranks must call in the same order what runs units of the model, and what reads or loads weights or optimizer
    state (`state_dict` and the like, `save_pretrained`, evaluation). Weights that are read are complete on each rank.

    Args:
        model: the same on every rank, values included; on the CPU or the meta device. Its parameters may be DTensors
            from torch.distributed.tensor.parallel: then the ranks that hold parts of them get equal batches.
        config: the machine's configuration: its ranks share host and disk budgets equally; a device budget is per rank.
            None: defaults.
        stage: 1 shards the optimizer's state, 2 also gradients, 3 also working weights.
        mesh: the mesh whose ranks share the model; None: all ranks do. With one dimension, each chunk is divided over
            it. With two, (replicate, shard), chunks are divided over the second, and the first has replicas of the
            shards. With tensor parallelism, it has the other dimensions of the same mesh.
        init_fn: as in GeminiDDP.
        weights: as in GeminiDDP; each rank reads what it keeps.

    Returns:
        The engine. With one rank, and no DTensors, it is a plain GeminiDDP.

    Raises:
        ConfigError: there is no process group, the stage or the mesh is not supported, ranks have different
            configurations, or gradients cannot meet where `exchange` says.
        ModelError: ranks have different models, DTensors are divided unevenly or over several meshes, another library
            manages the model, a parameter is of a kind that chunks cannot hold, or another rank could not build its
            engine.
        OutOfTierMemoryError: the budgets cannot hold the model.
        OffloadIOError: a swap file cannot be made, claimed or filled, or `weights` cannot be read.
        CheckpointError: `weights` is not a checkpoint, or it or the committed state is damaged.
        CheckpointMismatchError: `weights` belong to another model, or the committed state to another engine or step.
        CollectiveError: a rank did not take part.
    """
    config = config or GeminiConfig()
    if stage not in (1, 2, 3):
        raise ConfigError(f"zero.shard: stage: expected 1, 2 or 3, got {stage!r}")
    if not dist.is_initialized():
        raise ConfigError(
            "zero.shard: there is no process group: call torch.distributed.init_process_group first, in processes "
            "started by torchrun"
        )
    if mesh is not None and mesh.ndim > 2:
        raise ConfigError(
            f"zero.shard: mesh: expected one dimension, or two (replicate, shard), got {mesh.ndim}: {mesh}"
        )
    refuse_foreign(model, has_weights=weights is not None)
    process_group = None if mesh is None else mesh.get_group(mesh.ndim - 1)
    num_ranks = dist.get_world_size() if mesh is None else mesh.size()
    wanted = device_of(config)
    device = wanted if isinstance(wanted, torch.device) else torch.device("cpu")
    tensor_mesh = find_tensor_mesh(model, mesh, device)
    if num_ranks == 1 and tensor_mesh is None:
        return GeminiDDP(model, config, init_fn=init_fn, weights=weights)
    if device.type == "cuda" and dist.get_backend(process_group) == "gloo":
        raise ConfigError(
            f'zero.shard: gloo cannot exchange tensors on {device}: call init_process_group("nccl"), or train '
            'with GeminiConfig(device="cpu")'
        )
    group = TorchGroup(
        process_group,
        device,
        replicas=None if mesh is None or mesh.ndim == 1 else mesh.get_group(0),
        tensor_ranks=None if tensor_mesh is None else tensor_mesh.get_group(),
        swap_directory=None if config.nvme is None else Path(config.nvme.path),
    )
    check_grid(group)
    check_same_config(config, stage, group)
    check_same_model(model, group)
    node_ranks = find_node_ranks(group)
    config = share_node(config, len(node_ranks), group)
    with ExitStack() as files:
        file = None
        has_frozen = any(not param.requires_grad for param in model.parameters())
        if config.share_frozen and has_frozen and tensor_mesh is None:  # its ranks hold different parts
            file = open_frozen_file(node_ranks, group)
        if file is not None:
            files.callback(file.close)
        meeting = choose_host_memory(config, node_ranks, group)
        if meeting is not None:
            files.callback(meeting.close)
        sharding = Sharding(group=group, node_ranks=node_ranks, stage=stage, frozen_file=file, host_memory=meeting)
        try:
            build = partial(GeminiDDP, model, config, init_fn=init_fn, weights=weights, sharding=sharding)
            engine = _build(build, group)
        except OutOfTierMemoryError as error:
            if len(node_ranks) == 1:
                raise
            raise OutOfTierMemoryError(
                f"{error}. These are the bytes of one rank: set budgets {len(node_ranks)} times as large, because "
                "the ranks of this machine divide the host and disk budgets equally"
            ) from error
        for each in (file, meeting):
            if each is not None:
                each.seal()
    return engine


def _build(build: Callable[[], GeminiDDP], group: ShardGroup) -> GeminiDDP:
    """Return the engine once all ranks have one, or raise on all."""
    engine, failure = None, None
    try:
        engine = build()
    except Exception as error:  # the user's init_fn may raise anything; other ranks must not wait for this one
        failure = error
    try:
        check_all_built(failure, group)
    except GeminiError as disagreement:
        if engine is not None:
            engine.close(keep=engine.recovered is not None)
        raise failure or disagreement from None
    if failure is not None:
        raise failure
    assert engine is not None
    return engine
