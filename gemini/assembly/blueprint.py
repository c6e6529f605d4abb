"""Decisions before an engine allocates anything: layout, shards, plan, and the memory they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from gemini.chunk.layout import ChunkLayout, ChunkSpec, build_layout
from gemini.commits.file import CommitLayout
from gemini.commits.layout import CommitContent, lay_out_buffers, lay_out_overhead, refuse_device_homes
from gemini.config import GeminiConfig
from gemini.errors import ConfigError, ModelError
from gemini.kernels.adam_tile import state_format_of
from gemini.kernels.topology import MAX_WORKERS
from gemini.model.module_tree import describe_model
from gemini.model.tensor_parallel import is_dtensor, local_part
from gemini.model.working_dtypes import WorkingDtypes, choose_dtypes
from gemini.offload.resources import budgets_of
from gemini.placement.check import check_plan
from gemini.placement.plan import ChunkDemand, MemoryDemand, PlacementPlan, RuntimeShape, memory_demand
from gemini.placement.policy import Budgets, choose_plan
from gemini.placement.spares import add_spares
from gemini.ranks.one_rank import ALONE
from gemini.ranks.sharding import ChunkShard, Sharding
from gemini.tiers import MemoryTier

__all__ = ["Blueprint", "draw_blueprint", "draw_layout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Everything that is decided before a byte is allocated."""

    layout: ChunkLayout
    buffer_dtypes: Mapping[str, torch.dtype]
    """Dtype of each of the model's buffers, by its first name."""
    shards: tuple[ChunkShard | None, ...]
    """The shard of each chunk that lives here, by chunk id; None: all of it."""
    demands: tuple[ChunkDemand, ...]
    shape: RuntimeShape
    plan: PlacementPlan
    memory: MemoryDemand
    budgets: dict[MemoryTier, int | None]
    chunks_at_once: int
    commits: CommitLayout | None
    """Layout of the commit file, whose `nbytes` is its required length; None if there is none."""

    def commit_content(self) -> CommitContent:
        """Return what the commit file holds; there is one."""
        assert self.commits is not None
        return CommitContent(
            layout=self.layout,
            shards=self.shards,
            plan=self.plan,
            shape=self.shape,
            commits=self.commits,
            numels={demand.chunk_id: demand.numel for demand in self.demands if demand.is_trainable},
        )


def draw_blueprint(
    model: torch.nn.Module,
    config: GeminiConfig,
    *,
    sharding: Sharding = ALONE,
    budgets: dict[MemoryTier, int | None] | None = None,
    has_commits: bool = False,
) -> Blueprint:
    """Lay a model out and place its chunks. Neither allocates nor changes anything; the model may be on "meta".

    Args:
        model: the user's model.
        config: what the user asked for.
        sharding: the ranks that share the model.
        budgets: bytes per tier of the machine to plan for, as `budgets_of` gives them for this one; the configuration's
            device and budgets then do not count. None: this machine's.
        has_commits: whether steps will be committed to a memory file.

    Returns:
        Layout, plan and the bytes they take.

    Raises:
        ConfigError: the configuration contradicts itself or the machine.
        ModelError: the model has parameters that cannot be placed.
        OutOfTierMemoryError: the budgets cannot hold the model.
    """
    if sharding.is_alone:
        _refuse_dtensors(model)
    elif config.overlap == "speculative":
        raise ConfigError(
            'GeminiConfig.overlap: "speculative" is for one rank; choose "auto", "next-forward" or "off" when sharding'
        )
    if has_commits:
        _refuse_with_commits(config)
    dtypes = choose_dtypes(model, config.dtype)
    layout = _lay_out(model, config, dtypes)
    _refuse_overlaps(model)
    budgets = budgets_of(config) if budgets is None else budgets
    shards = tuple(sharding.group.shard_of(chunk.numel, chunk.dtype.itemsize) for chunk in layout.chunks)
    demands = tuple(
        _demand_of(chunk, shard, layout, sharding, has_commits=has_commits)
        for chunk, shard in zip(layout.chunks, shards, strict=True)
    )
    commits = _lay_out_commits(model, config, layout, dtypes, demands) if has_commits else None
    shape = _shape_of(config, budgets, commits, sharding, may_speculate=sharding.is_alone and not has_commits)
    chunks_at_once = max(len(unit.chunk_ids) for unit in layout.units)
    plan = _place(config, demands, shape, budgets, chunks_at_once)
    if commits is not None:
        refuse_device_homes(layout, plan)
        commits = dataclasses.replace(commits, buffer_nbytes=lay_out_buffers(demands, plan, shape))
    return Blueprint(
        layout=layout,
        buffer_dtypes=dtypes.buffers,
        shards=shards,
        demands=demands,
        shape=shape,
        plan=plan,
        memory=memory_demand(demands, plan, shape),
        budgets=budgets,
        chunks_at_once=chunks_at_once,
        commits=commits,
    )


def draw_layout(model: torch.nn.Module, config: GeminiConfig) -> ChunkLayout:
    """Lay a model out.

    Args:
        model: the user's model; may be on "meta".
        config: gives the working dtype and the smallest unit.

    Returns:
        Which parameter lies in which chunk.

    Raises:
        ModelError: the model has parameters that cannot be placed.
    """
    return _lay_out(model, config, choose_dtypes(model, config.dtype))


def _lay_out(model: torch.nn.Module, config: GeminiConfig, dtypes: WorkingDtypes) -> ChunkLayout:
    tree = describe_model(model, working_dtype=config.dtype, dtypes=dtypes.params)
    return build_layout(tree, max_small_nbytes=config.min_unit_nbytes)


def _lay_out_commits(
    model: torch.nn.Module,
    config: GeminiConfig,
    layout: ChunkLayout,
    dtypes: WorkingDtypes,
    demands: tuple[ChunkDemand, ...],
) -> CommitLayout:
    """Lay out the parts of a commit file other than the buffers, which the plan decides."""
    buffers = model.named_buffers()
    return lay_out_overhead(
        demands,
        tile_numel=config.tile_numel,
        num_params=sum(len(chunk.places) for chunk in layout.chunks),
        model_buffer_nbytes=sum(buffer.numel() * dtypes.buffers[name].itemsize for name, buffer in buffers),
        num_scratches=config.num_threads or MAX_WORKERS,
    )


def _shape_of(
    config: GeminiConfig,
    budgets: Mapping[MemoryTier, int | None],
    commits: CommitLayout | None,
    sharding: Sharding,
    *,
    may_speculate: bool,
) -> RuntimeShape:
    """Return the sizes of buffers from the configuration."""
    return RuntimeShape(
        has_device=budgets[MemoryTier.DEVICE] is not None,
        tile_numel=config.tile_numel,
        ring_depth=config.ring_depth,
        grad_itemsize=4 if config.gradient_accumulation else config.dtype.itemsize,
        meets_in_host=sharding.host_memory is not None,
        has_checksums=config.nvme is not None and config.nvme.verify,
        has_spares=may_speculate and config.overlap in ("auto", "speculative"),
        commits_nbytes=0 if commits is None else commits.buffers,
    )


def _plan_budgets(config: GeminiConfig, budgets: Mapping[MemoryTier, int | None]) -> Budgets:
    """Return what the plan may take of the budgets: all but what is kept for activations and their checkpoints."""
    device_nbytes, host_nbytes = budgets[MemoryTier.DEVICE], budgets[MemoryTier.HOST]
    assert host_nbytes is not None
    if device_nbytes is not None:
        host_nbytes -= config.checkpoint_reserve_of(host_nbytes)
        device_nbytes -= config.activation_reserve_of(device_nbytes)
    return Budgets(device=device_nbytes, host=host_nbytes, nvme=budgets[MemoryTier.NVME])


def _place(
    config: GeminiConfig,
    demands: tuple[ChunkDemand, ...],
    shape: RuntimeShape,
    budgets: Mapping[MemoryTier, int | None],
    chunks_at_once: int,
) -> PlacementPlan:
    """Return a plan within the budgets, with second places as far as they fit."""
    plan_budgets = _plan_budgets(config, budgets)
    plan = choose_plan(
        config.placement,
        demands,
        shape,
        plan_budgets,
        prefetch_depth=config.prefetch_depth,
        chunks_at_once=chunks_at_once,
    )
    plan = add_spares(demands, plan, shape, plan_budgets, must_fit=config.overlap == "speculative")
    check_plan(demands, plan, shape, plan_budgets, chunks_at_once=chunks_at_once)
    return plan


def _refuse_overlaps(model: torch.nn.Module) -> None:
    """Raise ModelError if two parameters share memory without being the same object: chunks would untie them."""
    params = ((name, local_part(param)) for name, param in model.named_parameters())
    ranges = sorted(
        (param.untyped_storage().data_ptr(), param.data_ptr(), param.data_ptr() + param.nbytes, name)
        for name, param in params
        if not param.is_meta and param.numel() > 1 and param.untyped_storage().nbytes() >= param.nbytes
    )
    for (storage, _, end, name), (next_storage, next_begin, _, next_name) in pairwise(ranges):
        if storage == next_storage and next_begin < end:
            raise ModelError(
                f"parameters {name} and {next_name} share memory but are two objects; tie them by assigning one "
                "Parameter to both modules before GeminiDDP(...)"
            )


def _refuse_dtensors(model: torch.nn.Module) -> None:
    for name, param in model.named_parameters():
        if is_dtensor(param):
            raise ModelError(
                f"parameter {name} is a DTensor, and other ranks hold parts of it: wrap the model with "
                "zero.shard(model, config, mesh=...); mesh is that of data parallelism and may have one rank"
            )


def _demand_of(
    chunk: ChunkSpec, shard: ChunkShard | None, layout: ChunkLayout, sharding: Sharding, *, has_commits: bool
) -> ChunkDemand:
    master = state_format_of(chunk.dtype).master_dtype if chunk.is_trainable else None
    is_in_root = chunk.unit_id == layout.root.unit_id
    file = None if chunk.is_trainable else sharding.frozen_file
    return ChunkDemand(
        chunk_id=chunk.chunk_id,
        numel=chunk.numel if shard is None else shard.numel,
        working_itemsize=chunk.dtype.itemsize,
        master_itemsize=master.itemsize if master is not None else 0,
        is_trainable=chunk.is_trainable,
        is_pinned=is_in_root or sharding.keeps_whole_weights,
        is_sharded=shard is not None,
        num_ranks=1 if shard is None else shard.num_ranks,
        num_sharers=1 if file is None else file.num_users,
        keeps_whole_gradient=shard is not None and (is_in_root or sharding.keeps_whole_gradients),
        is_committed=has_commits and chunk.is_trainable,
        has_one_param=len(chunk.places) == 1,
    )


def _refuse_with_commits(config: GeminiConfig) -> None:
    """Raise ConfigError if what a commit file is given with cannot be kept in it."""
    if config.overlap == "speculative":
        raise ConfigError(
            'commits: GeminiConfig.overlap: "speculative" updates state before a step that may be committed; choose '
            '"auto", "next-forward" or "off"'
        )
