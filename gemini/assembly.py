"""Put an engine together: lay the model out, plan, claim memory and disk, bring the weights home.

Whatever fails here leaves nothing behind: the model is untouched until memory and disk have been claimed.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from itertools import pairwise

import torch

from gemini.chunk.core import ChunkCore
from gemini.chunk.layout import ChunkLayout, ChunkSpec, build_layout, layout_summary
from gemini.chunk.module_tree import describe_model
from gemini.chunk.sharding import ChunkShard, Sharding, cut_spec, cut_values
from gemini.chunk.tensor_parallel import is_dtensor, local_part
from gemini.config import GeminiConfig
from gemini.errors import ConfigError, ModelError, OutOfTierMemoryError
from gemini.gradients import GradientStore
from gemini.heap import serve_cpu_memory
from gemini.initialise import InitFn, Initialiser, WeightSource, find_init_fn
from gemini.kernels.adam_tile import state_format_of
from gemini.kernels.device import DeviceKernels, select_device_kernels
from gemini.materialize import write_home
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources, budgets_of, open_resources
from gemini.offload.slots import FixedSlots
from gemini.offload.transfer import CpuTransfers
from gemini.placement.plan import (
    ChunkDemand,
    ChunkPlacement,
    MemoryDemand,
    PlacementPlan,
    RuntimeShape,
    has_shared_home,
    largest_buffers,
    memory_demand,
)
from gemini.placement.policy import Budgets, choose_plan
from gemini.runtime import Runtime
from gemini.sharded_gradients import ShardedGradients
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, parse_nbytes, round_up
from gemini.update import TilePipeline
from gemini.update_worker import UpdateWorker

__all__ = ["Blueprint", "assemble", "draw_blueprint", "draw_layout"]

logger = logging.getLogger(__name__)

DEFAULT_RESERVE = 0.3
"""Part of the device budget kept for activations until they have been measured."""
DEFAULT_CHECKPOINT_RESERVE = 0.1
"""Part of the host budget kept for activation checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Everything that is decided before a byte is allocated."""

    layout: ChunkLayout
    shards: tuple[ChunkShard | None, ...]
    """The shard of each chunk that lives here, by chunk id; None: all of it."""
    demands: tuple[ChunkDemand, ...]
    shape: RuntimeShape
    plan: PlacementPlan
    memory: MemoryDemand
    budgets: dict[MemoryTier, int | None]
    chunks_at_once: int


def draw_blueprint(
    model: torch.nn.Module,
    config: GeminiConfig,
    *,
    sharding: Sharding | None = None,
    budgets: dict[MemoryTier, int | None] | None = None,
) -> Blueprint:
    """Lay a model out and place its chunks. Neither allocates nor changes anything; the model may be on "meta".

    Args:
        model: the user's model.
        config: what the user asked for.
        sharding: the ranks that share the model; None: there are no others.
        budgets: bytes per tier of the machine to plan for, as `budgets_of` gives them for this one; the configuration's
            device and budgets then do not count. None: this machine's.

    Returns:
        Layout, plan and the bytes they take.

    Raises:
        ConfigError: the configuration contradicts itself or the machine.
        ModelError: the model has parameters that cannot be placed.
        OutOfTierMemoryError: the budgets cannot hold the model.
    """
    _refuse_overlaps(model)
    if sharding is None:
        _refuse_dtensors(model)
    if sharding is not None and config.overlap == "speculative":
        raise ConfigError(
            'GeminiConfig.overlap: "speculative" is for one rank; choose "auto", "next-forward" or "off" when sharding'
        )
    layout = draw_layout(model, config)
    shards = tuple(_shard_of(chunk, sharding) for chunk in layout.chunks)
    pairs = zip(layout.chunks, shards, strict=True)
    demands = tuple(_demand_of(chunk, shard, layout, sharding) for chunk, shard in pairs)
    budgets = budgets_of(config) if budgets is None else budgets
    device_nbytes = budgets[MemoryTier.DEVICE]
    shape = RuntimeShape(
        has_device=device_nbytes is not None,
        tile_numel=config.tile_numel,
        ring_depth=config.ring_depth,
        grad_itemsize=4 if config.gradient_accumulation else config.dtype.itemsize,
        has_checksums=config.nvme is not None and config.nvme.verify,
    )
    host_nbytes = budgets[MemoryTier.HOST]
    assert host_nbytes is not None
    chunks_at_once = max(len(unit.chunk_ids) for unit in layout.units)
    plan_budgets = Budgets(
        device=None if device_nbytes is None else device_nbytes - _reserve_of(config, device_nbytes),
        host=host_nbytes - (_checkpoint_reserve_of(config, host_nbytes) if shape.has_device else 0),
        nvme=budgets[MemoryTier.NVME],
    )

    def plan_with(shape: RuntimeShape) -> PlacementPlan:
        return choose_plan(
            config.placement,
            demands,
            shape,
            plan_budgets,
            prefetch_depth=config.prefetch_depth,
            chunks_at_once=chunks_at_once,
        )

    may_speculate = config.overlap in ("auto", "speculative") and sharding is None
    shape = dataclasses.replace(shape, has_spares=config.nvme is not None and may_speculate)
    try:
        plan = plan_with(shape)
    except OutOfTierMemoryError:
        if not shape.has_spares or config.overlap != "auto":
            raise
        shape = dataclasses.replace(shape, has_spares=False)
        plan = plan_with(shape)
    return Blueprint(
        layout=layout,
        shards=shards,
        demands=demands,
        shape=shape,
        plan=plan,
        memory=memory_demand(demands, plan, shape),
        budgets=budgets,
        chunks_at_once=chunks_at_once,
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
    return build_layout(describe_model(model, working_dtype=config.dtype), max_small_nbytes=config.min_unit_nbytes)


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
                f"parameter {name} is a DTensor, of which other ranks hold parts: wrap the model with "
                "zero.shard(model, config, mesh=...), where the mesh is that of data parallelism, of one rank or more"
            )


def _reserve_of(config: GeminiConfig, device_nbytes: int) -> int:
    if config.activation_reserve is not None:
        return parse_nbytes(config.activation_reserve, name="activation_reserve")
    return int(device_nbytes * DEFAULT_RESERVE)


def _checkpoint_reserve_of(config: GeminiConfig, host_nbytes: int) -> int:
    if config.num_batch_slices == 1:
        return 0
    if config.checkpoint_reserve is not None:
        return parse_nbytes(config.checkpoint_reserve, name="checkpoint_reserve")
    return int(host_nbytes * DEFAULT_CHECKPOINT_RESERVE)


def _shard_of(chunk: ChunkSpec, sharding: Sharding | None) -> ChunkShard | None:
    return None if sharding is None else sharding.group.shard_of(chunk.numel, chunk.dtype.itemsize)


def _demand_of(
    chunk: ChunkSpec, shard: ChunkShard | None, layout: ChunkLayout, sharding: Sharding | None
) -> ChunkDemand:
    master = state_format_of(chunk.dtype).master_dtype if chunk.is_trainable else None
    is_in_root = chunk.unit_id == layout.root.unit_id
    file = None if sharding is None or chunk.is_trainable else sharding.frozen_file
    return ChunkDemand(
        chunk_id=chunk.chunk_id,
        numel=chunk.numel if shard is None else shard.numel,
        working_itemsize=chunk.dtype.itemsize,
        master_itemsize=master.itemsize if master is not None else 0,
        is_trainable=chunk.is_trainable,
        is_pinned=is_in_root or (sharding is not None and sharding.keeps_whole_weights),
        is_sharded=shard is not None,
        num_ranks=1 if shard is None else shard.num_ranks,
        num_sharers=1 if file is None else file.num_users,
        keeps_whole_gradient=sharding is not None and (is_in_root or sharding.keeps_whole_gradients),
        has_one_param=len(chunk.slots) == 1,
    )


def assemble(
    model: torch.nn.Module,
    config: GeminiConfig,
    *,
    init_fn: InitFn | None,
    weights: WeightSource | None = None,
    sharding: Sharding | None = None,
) -> Runtime:
    """Build the runtime for a model and move its weights into it.

    Args:
        model: changed in place: its parameters become views of chunks.
        config: what the user asked for.
        init_fn: gives modules on the meta device their first values; None: the model's own way.
        weights: first values that take the place of those the model has or would be given; None: there are none.
        sharding: the ranks that share the model; None: there are no others.

    Returns:
        The runtime, ready for the first step.

    Raises:
        ConfigError: the configuration contradicts itself or the machine.
        ModelError: the model has parameters or buffers that cannot be placed.
        OutOfTierMemoryError: the budgets, or the machine, cannot hold the model.
        OffloadIOError: the swap file cannot be made, claimed or filled, or `weights` cannot be read.
    """
    blueprint = draw_blueprint(model, config, sharding=sharding)
    logger.info("%s", layout_summary(blueprint.layout))
    serve_cpu_memory(config.cpu_allocator, is_compute_on_cpu=not blueprint.shape.has_device)
    disk_nbytes = blueprint.memory.total(MemoryTier.NVME)
    rank = 0 if sharding is None else sharding.group.rank
    resources = open_resources(config, blueprint.budgets, disk_nbytes=disk_nbytes, rank=rank)
    try:
        builder = _Builder(config, blueprint, resources, sharding, weights)
        runtime = builder.build(model, init_fn or find_init_fn(model))
    except BaseException:
        resources.close()
        raise
    return runtime


@dataclass(frozen=True, slots=True)
class _Builder:
    """Carries a blueprint out."""

    config: GeminiConfig
    blueprint: Blueprint
    resources: Resources
    sharding: Sharding | None
    weights: WeightSource | None

    def build(self, model: torch.nn.Module, init_fn: InitFn) -> Runtime:
        """Claim memory and disk and bring the weights home."""
        blueprint, device = self.blueprint, self.resources.transfers.device
        shape, plan = blueprint.shape, blueprint.plan
        buffers = largest_buffers(blueprint.demands, plan, shape)
        kernels = select_device_kernels(device)
        core = self._make_core(fetch_slot_nbytes=buffers["fetch slots"])
        gradients = self._make_gradients(kernels, buffers)
        pipeline = TilePipeline(
            self.resources, tile_numel=shape.tile_numel, ring_depth=shape.ring_depth, ring_nbytes=buffers["update ring"]
        )
        states: dict[int, TiledHome] = {}
        first_values = Initialiser(
            model, init_fn, weights=self.weights, device=device, dtype=self.config.dtype, seed=self.config.seed
        )
        with first_values as initialiser:
            initialiser.fill_buffers()
            self._lay_out_shared_weights()
            for homes in plan.chunks:
                self._add_chunk(homes, core, gradients, states, initialiser)
        for homes in plan.chunks:
            if homes.is_resident:
                core.settle(homes.chunk_id)
        for name, buffer in model.named_buffers():
            if buffer.device != device:
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        return Runtime(
            self.config,
            layout=blueprint.layout,
            plan=plan,
            demands=blueprint.demands,
            shape=shape,
            resources=self.resources,
            core=core,
            states=states,
            gradients=gradients,
            worker=UpdateWorker(pipeline),
            kernels=kernels,
            sharding=self.sharding,
        )

    def _make_core(self, *, fetch_slot_nbytes: int) -> ChunkCore:
        plan, transfers = self.blueprint.plan, self.resources.transfers
        return ChunkCore(
            self.resources,
            slots=FixedSlots(transfers, num_slots=plan.num_slots, slot_nbytes=plan.slot_nbytes, purpose="slots"),
            staging=FixedSlots(
                CpuTransfers(self.resources.arena),
                num_slots=self.blueprint.shape.num_fetch_slots if fetch_slot_nbytes else 0,
                slot_nbytes=fetch_slot_nbytes,
                purpose="fetch slots",
            ),
            num_protected=max(1, min(self.blueprint.chunks_at_once, plan.num_slots - 1)),
            group=None if self.sharding is None else self.sharding.group,
        )

    def _make_gradients(self, kernels: DeviceKernels, buffers: dict[str, int]) -> GradientStore | ShardedGradients:
        num_slots = self.blueprint.shape.num_grad_slots
        store = GradientStore(
            self.resources,
            device_kernels=kernels,
            grad_dtype_of=lambda spec: torch.float32 if self.config.gradient_accumulation else spec.dtype,
            num_slots=num_slots,
            device_slot_nbytes=buffers["device gradient slots"],
            disk_slot_nbytes=buffers["disk gradient slots"],
        )
        if self.sharding is None:
            return store
        return ShardedGradients(
            store,
            self.sharding.group,
            self.resources.transfers,
            num_slots=num_slots,
            slot_nbytes=buffers["exchange slots"] // 2,
        )

    def _lay_out_shared_weights(self) -> None:
        """Say how much the ranks of this machine will keep in their common file."""
        blueprint = self.blueprint
        pairs = zip(blueprint.demands, blueprint.plan.chunks, strict=True)
        nbytes = sum(demand.compute_nbytes for demand, homes in pairs if has_shared_home(demand, homes.working))
        if self.sharding is not None and self.sharding.frozen_file is not None:
            self.sharding.frozen_file.lay_out(nbytes, is_read_in_place=not blueprint.shape.has_device)

    def _add_shared_chunk(self, homes: ChunkPlacement, core: ChunkCore, initialiser: Initialiser) -> None:
        """Take a frozen chunk's part of the common file; the rank that writes it brings the weights home."""
        blueprint, arena = self.blueprint, self.resources.arena
        spec, demand = blueprint.layout.chunks[homes.chunk_id], blueprint.demands[homes.chunk_id]
        tile_numel = blueprint.shape.tile_numel
        padded = dataclasses.replace(demand, numel=demand.num_ranks * demand.numel)
        tile_nbytes = [padded.working_tile_nbytes(tile, tile_numel) for tile in range(padded.num_tiles(tile_numel))]
        assert self.sharding is not None
        assert self.sharding.frozen_file is not None
        home = TiledHome(
            (MemoryTier.HOST,) * len(tile_nbytes),
            tile_nbytes,
            arena=arena,
            store=None,
            shared=arena.take_shared(self.sharding.frozen_file, demand.compute_nbytes, "shared weights"),
            purpose="shared weights",
        )
        if home.is_writable:
            write_home(
                dataclasses.replace(spec, numel=padded.numel),
                (initialiser.values_of(slot.spec.name) for slot in spec.slots),
                home,
                None,
                tile_numel=tile_numel,
                transfers=self.resources.transfers,
                isa=self.resources.isa,
            )
            home.refresh()
        params = [initialiser.params[slot.spec.name] for slot in spec.slots]
        core.add(spec, params, home, is_resident=homes.is_resident)

    def _add_chunk(
        self,
        homes: ChunkPlacement,
        core: ChunkCore,
        gradients: GradientStore | ShardedGradients,
        states: dict[int, TiledHome],
        initialiser: Initialiser,
    ) -> None:
        chunk_id, blueprint = homes.chunk_id, self.blueprint
        spec, shard, demand = blueprint.layout.chunks[chunk_id], blueprint.shards[chunk_id], blueprint.demands[chunk_id]
        if has_shared_home(demand, homes.working):
            self._add_shared_chunk(homes, core, initialiser)
            return
        working, state, grad = _open_homes(demand, homes, blueprint.shape, self.resources, name=spec.name)
        home_spec = spec if shard is None else cut_spec(spec, shard)
        values = (initialiser.values_of(slot.spec.name) for slot in home_spec.slots)
        write_home(
            home_spec,
            values if shard is None else cut_values(spec, shard, values),
            working,
            state,
            tile_numel=blueprint.shape.tile_numel,
            transfers=self.resources.transfers,
            isa=self.resources.isa,
        )
        params = [initialiser.params[slot.spec.name] for slot in spec.slots]
        core.add(spec, params, working, is_resident=homes.is_resident, shard=shard)
        if state is None or grad is None or homes.grad is None:
            return
        states[chunk_id] = state
        if isinstance(gradients, ShardedGradients):
            assert shard is not None
            gradients.add_chunk(spec, shard, grad, homes.grad, is_kept_whole=demand.keeps_whole_gradient)
        else:
            gradients.add_chunk(spec, grad, homes.grad)


def _open_homes(
    demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape, resources: Resources, *, name: str
) -> tuple[TiledHome, TiledHome | None, TiledHome | None]:
    """Claim memory and disk for a chunk's working weights, state and gradients."""
    tiles = range(demand.num_tiles(shape.tile_numel))

    spare_tiles = homes.spare_tiles() if shape.has_spares else ()

    def open_home(
        tiers: tuple[MemoryTier, ...], tile_nbytes: list[int], purpose: str, spare_tiles: tuple[int, ...] = ()
    ) -> TiledHome:
        on_device = sum(n for t, n in zip(tiers, tile_nbytes, strict=True) if t is MemoryTier.DEVICE)
        return TiledHome(
            tiers,
            tile_nbytes,
            arena=resources.arena,
            store=resources.store,
            device_buffer=resources.transfers.allocate(on_device, purpose) if on_device else None,
            spare_tiles=spare_tiles,
            purpose=purpose,
            record=f"{'weights' if purpose == 'working' else purpose} of {name}",
        )

    def aligned(nbytes: int) -> int:
        return round_up(nbytes, IO_ALIGNMENT_NBYTES)

    working = open_home(
        homes.working,
        [aligned(demand.working_tile_nbytes(t, shape.tile_numel)) for t in tiles],
        "working",
        spare_tiles,
    )
    if homes.grad is None:
        return working, None, None
    state = open_home(homes.state, [demand.state_tile_nbytes(t, shape.tile_numel) for t in tiles], "state", spare_tiles)
    grad_nbytes = [aligned(demand.tile_length(t, shape.tile_numel) * shape.grad_itemsize) for t in tiles]
    grad = open_home((homes.grad,) * len(tiles), grad_nbytes, "gradients")
    for home in (state, grad):
        if home.host_buffer is not None:
            home.host_buffer.zero_()  # touch the pages now, not in the first step
    return working, state, grad
