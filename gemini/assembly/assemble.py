"""Build an engine from its blueprint: claim memory and disk, and write the weights to their homes.

Whatever fails here leaves nothing behind: the model is untouched until memory and disk have been claimed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch

from gemini.assembly.blueprint import Blueprint, draw_blueprint
from gemini.assembly.engine_memory import EngineMemory, OwnMemory
from gemini.assembly.first_values import InitFn, Initialiser, WeightSource, find_init_fn, place_buffers
from gemini.assembly.homes import write_home
from gemini.assembly.node_memory import ASKING, NodeMemory
from gemini.assembly.shared_weights import SharedPart, SharedWeights
from gemini.chunk.core import ChunkCore
from gemini.chunk.cut import cut_spec, cut_values
from gemini.chunk.layout import ChunkSpec, layout_summary
from gemini.commits.file import CommitFile
from gemini.commits.recovery import ClaimedCommits, Commits, NoCommits
from gemini.config import GeminiConfig
from gemini.errors import ModelError, OutOfTierMemoryError, ServiceError
from gemini.gradients.arrivals import Gradients
from gemini.gradients.part_sums import CollectiveSums
from gemini.gradients.sharded import ShardedGradients
from gemini.gradients.store import GradientStore
from gemini.heap import serve_cpu_memory
from gemini.kernels.device import DeviceKernels, select_device_kernels
from gemini.kernels.pool import Ticket
from gemini.model.flat_values import FlatValues
from gemini.model.module_calls import is_compiled
from gemini.offload.arena import MemorySource
from gemini.offload.home import HomeReaders, TiledHome
from gemini.offload.memory_file import SharedBuffer
from gemini.offload.resources import Resources, open_resources
from gemini.offload.slots import FixedSlots
from gemini.offload.transfer import CpuTransfers
from gemini.placement.plan import (
    ChunkDemand,
    ChunkPlacement,
    has_shared_home,
    is_read_by_ranks,
    largest_buffers,
)
from gemini.placement.tracer import UseTrace
from gemini.profile.listeners import RunListeners
from gemini.ranks.agreement import on_all_ranks
from gemini.ranks.one_rank import ALONE, PRIVATE_HOMES
from gemini.ranks.sharding import HostExchange, PartSums, Sharding, SharedHomes
from gemini.runtime.runtime import Runtime
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, format_nbytes, round_up
from gemini.update.pipeline import TilePipeline
from gemini.update.worker import UpdateWorker

__all__ = ["assemble"]

logger = logging.getLogger(__name__)


def assemble(
    model: torch.nn.Module,
    config: GeminiConfig,
    *,
    init_fn: InitFn | None,
    weights: WeightSource | None = None,
    sharding: Sharding = ALONE,
    commits: CommitFile | None = None,
) -> Runtime:
    """Build the runtime for a model and move its weights into it.

    Args:
        model: changed in place: its parameters become views of chunks.
        config: what the user asked for.
        init_fn: gives modules on the meta device their first values; None: the model's own way.
        weights: first values that take the place of those the model has or would be given; None: there are none.
        sharding: the ranks that share the model.
        commits: keeps the state of what is trained beyond the end of the process, and may hold it already; closed with
            the runtime. None: nothing does.

    Returns:
        The runtime, ready for the first step.

    Raises:
        CheckpointMismatchError: `commits` holds the state of another engine.
        CheckpointError: `commits` is damaged.
        ConfigError: the configuration contradicts itself or the machine.
        ModelError: the model has parameters or buffers that cannot be placed.
        OutOfTierMemoryError: the budgets, the machine or the memory service cannot hold the model.
        OffloadIOError: the swap file cannot be made, claimed or filled, or `weights` cannot be read.
        ServiceError: there is no memory service, or it refuses.
    """
    memory: EngineMemory = OwnMemory(config)
    try:
        if config.service is not None:
            with on_all_ranks(sharding, what=ASKING, error_type=ServiceError):
                memory = NodeMemory.connect(config, sharding)
        runtime = _assemble(model, config, init_fn, weights, sharding, commits, memory)
        memory.confirm()
        return runtime
    except BaseException:
        if commits is not None:
            commits.close()
        memory.abandon()
        raise


def _assemble(
    model: torch.nn.Module,
    config: GeminiConfig,
    init_fn: InitFn | None,
    weights: WeightSource | None,
    sharding: Sharding,
    commits: CommitFile | None,
    memory: EngineMemory,
) -> Runtime:
    has_commits = commits is not None or config.snapshots
    budgets = memory.budgets()
    with memory.explaining_budget():
        blueprint = draw_blueprint(model, config, sharding=sharding, budgets=budgets, has_commits=has_commits)
    _check_compiled(model, blueprint)
    logger.info("%s", layout_summary(blueprint.layout))
    serve_cpu_memory(config.cpu_allocator, is_compute_on_cpu=not blueprint.shape.has_device)
    disk_nbytes = blueprint.memory.total(MemoryTier.NVME)
    parts = memory.shared_parts(blueprint, model, weights)
    swap_file, lent_file = memory.claim(blueprint, parts.values())
    commit_file = lent_file or commits
    kept: Commits = NoCommits()
    if commit_file is not None:
        with memory.explaining():
            kept = ClaimedCommits.claim(commit_file, blueprint.commit_content(), sharding)
    resources = open_resources(
        config,
        blueprint.budgets,
        disk_nbytes=disk_nbytes,
        rank=sharding.group.rank,
        kept=kept.swap,
        given=swap_file,
        granted_by=memory,
    )
    with ThreadPoolExecutor(resources.pool.num_threads) as threads, ExitStack() as on_error:
        on_error.callback(resources.close, keep=kept.step is not None)
        resources.ledger.charge(MemoryTier.HOST, "commits", blueprint.shape.commits_nbytes)
        builder = _Builder(config, blueprint, resources, sharding, weights, kept, memory, parts, threads, on_error)
        runtime = builder.build(model, init_fn or find_init_fn(model))
        on_error.pop_all()
    return runtime


def _check_compiled(model: torch.nn.Module, blueprint: Blueprint) -> None:
    """Refuse a model that is compiled as a whole, unless all weights stay where its code can read them unannounced."""
    stay = all(homes.is_resident for homes in blueprint.plan.chunks) and not any(blueprint.shards)
    if is_compiled(model) and not stay:
        raise ModelError(
            "the model is compiled as a whole, and some of its weights are not always in compute memory: "
            "compiled code that reads a weight outside its module would find no values; compile its blocks "
            "instead, for example `for block in model.blocks: block.compile()`"
        )


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds the engine of a blueprint."""

    config: GeminiConfig
    blueprint: Blueprint
    resources: Resources
    sharding: Sharding
    weights: WeightSource | None
    commits: Commits
    memory: EngineMemory
    parts: Mapping[int, SharedPart]
    """Chunks that can be shared with other jobs, by chunk id."""
    threads: Executor
    """Share the work of splitting first weights."""
    on_error: ExitStack
    """Closes what has been opened, should the rest fail."""
    touched: list[Ticket | None] = field(default_factory=list)
    """First touches of homes' memory that may be under way."""

    def build(self, model: torch.nn.Module, init_fn: InitFn) -> Runtime:
        """Claim memory and disk, and write the weights to their homes."""
        blueprint, device = self.blueprint, self.resources.transfers.device
        shape, plan = blueprint.shape, blueprint.plan
        buffers = largest_buffers(blueprint.demands, plan, shape)
        kernels = select_device_kernels(device)
        listeners, trace = RunListeners(), UseTrace()
        sums, shared_homes = self._open_exchange(buffers["exchange slots"])
        self.on_error.callback(sums.close)
        self.on_error.callback(shared_homes.close)
        core = self._make_core(listeners, trace, shared_homes, fetch_slot_nbytes=buffers["fetch slots"])
        gradients = self._make_gradients(kernels, buffers, sums)
        self.on_error.callback(core.close)
        self.on_error.callback(gradients.close)
        pipeline = TilePipeline(
            self.resources,
            tile_numel=shape.tile_numel,
            ring_depth=shape.ring_depth,
            ring_nbytes=buffers["update ring"],
            log=self.commits.log,
        )
        states: dict[int, TiledHome] = {}
        dtypes = {name: place.spec.dtype for name, place in blueprint.layout.place_by_name.items()}
        first_values = Initialiser(
            model, init_fn, weights=self.weights, device=device, dtypes=dtypes, seed=self.config.seed
        )
        with first_values as initialiser:
            initialiser.fill_buffers()
            self._lay_out_shared_weights()
            for homes in plan.chunks:
                self._add_chunk(homes, core, gradients, states, initialiser)
        for ticket in self.touched:
            if ticket is not None:
                ticket.wait()
        self._stage_pageable_weights(core)
        self.commits.redo(core, states, gradients, pipeline)
        for homes in plan.chunks:
            if homes.is_resident:
                core.residents.bring_in(homes.chunk_id)
        place_buffers(model, device, blueprint.buffer_dtypes)
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
            worker=UpdateWorker(pipeline, listeners),
            listeners=listeners,
            trace=trace,
            kernels=kernels,
            sharding=self.sharding,
            commits=self.commits,
        )

    def _open_exchange(self, slot_nbytes: int) -> HostExchange:
        """Claim the memory in which gradients of ranks are put together, and that in which ranks see each other's."""
        resources, sharding, shape = self.resources, self.sharding, self.blueprint.shape
        num_slots = shape.num_grad_slots
        if sharding.host_memory is None:
            sums = CollectiveSums(sharding.group, resources.transfers, num_slots=num_slots, slot_nbytes=slot_nbytes)
            return HostExchange(sums, PRIVATE_HOMES)
        pairs = zip(self.blueprint.demands, self.blueprint.plan.chunks, strict=True)
        nbytes = sum(demand.working_nbytes for demand, homes in pairs if is_read_by_ranks(demand, homes.working, shape))
        return sharding.host_memory.open(resources, num_slots=num_slots, slot_nbytes=slot_nbytes, homes_nbytes=nbytes)

    def _make_core(
        self, listeners: RunListeners, trace: UseTrace, shared_homes: SharedHomes, *, fetch_slot_nbytes: int
    ) -> ChunkCore:
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
            group=self.sharding.group,
            shared_homes=shared_homes,
            next_use=trace.next_use_distance,
            listeners=listeners,
        )

    def _stage_pageable_weights(self, core: ChunkCore) -> None:
        """Copy weights that could not be page-locked through page-locked slots, if there is room for slots."""
        arena, shape, plan = self.resources.arena, self.blueprint.shape, self.blueprint.plan
        pageable = [chunk for chunk in core.chunks if chunk.home.is_pageable]
        if not pageable:
            return
        sizes = [sum(chunk.home.tile_nbytes) for chunk in pageable]
        planned_nbytes = largest_buffers(self.blueprint.demands, plan, shape)["fetch slots"]
        try:
            slots = None
            if max(sizes) > planned_nbytes:
                slots = FixedSlots(
                    CpuTransfers(arena), num_slots=shape.num_fetch_slots, slot_nbytes=max(sizes), purpose="fetch slots"
                )
        except OutOfTierMemoryError as error:
            logger.warning(
                "%s of weights are not page-locked, and there is no host memory for slots that are, so copies to the "
                "device block: %s",
                format_nbytes(sum(sizes)),
                error,
            )
            return
        core.stage_pageable(slots)
        logger.info("%s of weights are not page-locked and pass through slots that are", format_nbytes(sum(sizes)))

    def _make_gradients(self, kernels: DeviceKernels, buffers: dict[str, int], sums: PartSums) -> Gradients:
        num_slots = self.blueprint.shape.num_grad_slots
        store = GradientStore(
            self.resources,
            device_kernels=kernels,
            grad_dtype_of=lambda spec: torch.float32 if self.config.gradient_accumulation else spec.dtype,
            num_slots=num_slots,
            device_slot_nbytes=buffers["device gradient slots"],
            disk_slot_nbytes=buffers["disk gradient slots"],
        )
        if self.sharding.is_alone:
            return store
        return ShardedGradients(store, self.sharding.group, self.resources.transfers, sums)

    def _lay_out_shared_weights(self) -> None:
        """Say how much the ranks of this machine will keep in their common file."""
        blueprint = self.blueprint
        pairs = zip(blueprint.demands, blueprint.plan.chunks, strict=True)
        nbytes = sum(demand.compute_nbytes for demand, homes in pairs if has_shared_home(demand, homes.working))
        if self.sharding.frozen_file is not None:
            self.sharding.frozen_file.lay_out(nbytes, is_read_in_place=not blueprint.shape.has_device)

    def _add_shared_chunk(self, homes: ChunkPlacement, core: ChunkCore, initialiser: Initialiser) -> None:
        """Take a frozen chunk's part of the common file; the writing rank fills it with the weights."""
        blueprint, arena = self.blueprint, self.resources.arena
        spec, demand = blueprint.layout.chunks[homes.chunk_id], blueprint.demands[homes.chunk_id]
        tile_numel = blueprint.shape.tile_numel
        padded = dataclasses.replace(demand, numel=demand.num_ranks * demand.numel)
        tile_nbytes = [padded.working_tile_nbytes(tile, tile_numel) for tile in range(padded.num_tiles(tile_numel))]
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
            values = (initialiser.values_of(place.spec.name) for place in spec.places)
            self._write(dataclasses.replace(spec, numel=padded.numel), values, home, None)
            home.refresh()
        params = [initialiser.params[place.spec.name] for place in spec.places]
        core.add(spec, params, home, is_resident=homes.is_resident)

    def _write_shared(
        self, spec: ChunkSpec, demand: ChunkDemand, initialiser: Initialiser, memory: torch.Tensor
    ) -> None:
        """Write a frozen chunk's weights to memory that other jobs will read, uint8 [its bytes]."""
        tile_numel = self.blueprint.shape.tile_numel
        tile_nbytes = [
            round_up(demand.working_tile_nbytes(tile, tile_numel), IO_ALIGNMENT_NBYTES)
            for tile in range(demand.num_tiles(tile_numel))
        ]
        home = TiledHome(
            (MemoryTier.HOST,) * len(tile_nbytes),
            tile_nbytes,
            arena=self.resources.arena,
            store=None,
            shared=SharedBuffer(view=memory, writer=memory, mappings=(), offset=0),
            purpose="shared weights",
        )
        self._write(spec, (initialiser.values_of(place.spec.name) for place in spec.places), home, None)

    def _write(
        self, spec: ChunkSpec, values: Iterable[FlatValues], working: TiledHome, state: TiledHome | None
    ) -> None:
        write_home(
            spec,
            values,
            working,
            state,
            tile_numel=self.blueprint.shape.tile_numel,
            transfers=self.resources.transfers,
            isa=self.resources.isa,
            threads=self.threads,
        )

    def _add_chunk(
        self,
        homes: ChunkPlacement,
        core: ChunkCore,
        gradients: Gradients,
        states: dict[int, TiledHome],
        initialiser: Initialiser,
    ) -> None:
        chunk_id, blueprint = homes.chunk_id, self.blueprint
        spec, shard, demand = blueprint.layout.chunks[chunk_id], blueprint.shards[chunk_id], blueprint.demands[chunk_id]
        if has_shared_home(demand, homes.working):
            self._add_shared_chunk(homes, core, initialiser)
            return
        source = self.commits.log.memory if demand.is_trainable else None
        part = self.parts.get(chunk_id)
        if part is not None:
            source = SharedWeights(self.memory.shared, part, partial(self._write_shared, spec, demand, initialiser))
        working, state, grad = self._open_homes(demand, homes, source, core.shared_homes, name=spec.name)
        if part is None and not (demand.is_trainable and self.commits.step is not None):
            home_spec = spec if shard is None else cut_spec(spec, shard)
            values = (initialiser.values_of(place.spec.name) for place in home_spec.places)
            own_values = values if shard is None else cut_values(spec, shard, values)
            self._write(home_spec, own_values, working, state)
        params = [initialiser.params[place.spec.name] for place in spec.places]
        core.add(spec, params, working, is_resident=homes.is_resident, shard=shard)
        if state is None or grad is None or homes.grad is None:
            return
        states[chunk_id] = state
        gradients.add_chunk(spec, grad, homes.grad, shard=shard, is_kept_whole=demand.keeps_whole_gradient)

    def _open_homes(
        self,
        demand: ChunkDemand,
        homes: ChunkPlacement,
        source: MemorySource | None,
        shared_homes: SharedHomes,
        *,
        name: str,
    ) -> tuple[TiledHome, TiledHome | None, TiledHome | None]:
        """Claim memory and disk for a chunk's working weights, state and gradients."""
        resources, shape = self.resources, self.blueprint.shape
        tiles = range(demand.num_tiles(shape.tile_numel))

        def open_home(
            tiers: tuple[MemoryTier, ...],
            tile_nbytes: list[int],
            purpose: str,
            *,
            spare_tiles: tuple[int, ...] = (),
            source: MemorySource | None = source,
            readers: HomeReaders | None = None,
        ) -> TiledHome:
            home = TiledHome(
                tiers,
                tile_nbytes,
                arena=resources.arena,
                store=resources.store,
                transfers=resources.transfers,
                source=source,
                readers=readers,
                spare_tiles=spare_tiles,
                purpose=purpose,
                spare_purpose="state spares" if purpose == "state" else "spares",
                record=f"{'weights' if purpose == 'working' else purpose} of {name}",
            )
            self.on_error.callback(home.close)
            if home.is_private:
                self.touched.append(home.populate())  # now, not in the first step
            return home

        working_nbytes = [round_up(demand.working_tile_nbytes(t, shape.tile_numel), IO_ALIGNMENT_NBYTES) for t in tiles]
        if is_read_by_ranks(demand, homes.working, shape):
            readers = shared_homes.readers_of(demand.chunk_id)
            shared = shared_homes.claim(demand.chunk_id, sum(working_nbytes))
            working = open_home(homes.working, working_nbytes, "working", source=shared, readers=readers)
        else:
            working = open_home(homes.working, working_nbytes, "working", spare_tiles=homes.spares)
        if homes.grad is None:
            return working, None, None
        state_nbytes = [demand.state_tile_nbytes(t, shape.tile_numel) for t in tiles]
        state = open_home(homes.state, state_nbytes, "state", spare_tiles=homes.spares)
        grad_itemsize = demand.grad_itemsize(shape)
        grad_nbytes = [
            round_up(demand.tile_length(t, shape.tile_numel) * grad_itemsize, IO_ALIGNMENT_NBYTES) for t in tiles
        ]
        grad = open_home((homes.grad,) * len(tiles), grad_nbytes, "gradients")
        return working, state, grad
