"""Whether a plan is well formed and fits its budgets, and what to say when it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from gemini.errors import ConfigError, OutOfTierMemoryError
from gemini.placement.plan import (
    ChunkDemand,
    ChunkPlacement,
    MemoryDemand,
    PlacementPlan,
    RuntimeShape,
    can_have_spare,
    has_shared_home,
    is_used_in_place,
    memory_demand,
)
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, format_nbytes, round_up

__all__ = ["Budgets", "check_budgets", "check_plan", "shortage_error"]

_BUDGET_NAMES = {
    MemoryTier.DEVICE: "device_budget",
    MemoryTier.HOST: "host_budget",
    MemoryTier.NVME: "NVMeConfig.budget",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes that what `memory_demand` counts may take in each tier."""

    device: int | None
    """Device bytes, activations and temporaries already subtracted. None: there is no device tier."""
    host: int
    """Host bytes."""
    nvme: int | None
    """Disk bytes. None: there is no disk tier."""

    def of(self, tier: MemoryTier) -> int:
        """Return a tier's bytes; 0 if there is no such tier."""
        nbytes = {MemoryTier.DEVICE: self.device, MemoryTier.HOST: self.host, MemoryTier.NVME: self.nvme}[tier]
        return 0 if nbytes is None else nbytes


def check_plan(
    chunks: Sequence[ChunkDemand],
    plan: PlacementPlan,
    shape: RuntimeShape,
    budgets: Budgets,
    *,
    chunks_at_once: int = 2,
) -> MemoryDemand:
    """Check that a plan is for these chunks, keeps the rules of `ChunkPlacement`, and fits the budgets.

    Args:
        chunks: the chunks, by id.
        plan: homes and slots.
        shape: sizes of the buffers.
        budgets: bytes per tier.
        chunks_at_once: the most chunks without a residence that must be in compute memory at the same time.

    Returns:
        The bytes the plan takes.

    Raises:
        ConfigError: the plan is malformed or is for other chunks.
        OutOfTierMemoryError: the plan takes more than a tier's budget.
    """
    if shape.has_device != (budgets.device is not None):
        raise ConfigError(f"Budgets.device: expected bytes exactly when there is a device tier, got {budgets.device!r}")
    if len(plan.chunks) != len(chunks):
        raise ConfigError(f"PlacementPlan.chunks: expected {len(chunks)} chunks, got {len(plan.chunks)}")
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        problem = _find_problem(demand, homes, shape, budgets)
        if problem:
            raise ConfigError(f"PlacementPlan: chunk {demand.chunk_id}: {problem}")
    _check_slots(chunks, plan, chunks_at_once)
    demand_of_all = memory_demand(chunks, plan, shape)
    check_budgets(chunks, plan, shape, budgets)
    return demand_of_all


def check_budgets(
    chunks: Sequence[ChunkDemand],
    plan: PlacementPlan,
    shape: RuntimeShape,
    budgets: Budgets,
    *,
    plan_name: str = "the plan",
) -> None:
    """Raise if a well-formed plan takes more than a tier's budget.

    Args:
        chunks: the chunks, by id.
        plan: homes and slots.
        shape: sizes of the buffers.
        budgets: bytes per tier.
        plan_name: what the message calls the plan.

    Raises:
        OutOfTierMemoryError: a tier is short; the first of device, host and disk is named.
    """
    demand = memory_demand(chunks, plan, shape)
    for tier in MemoryTier:
        if demand.total(tier) > budgets.of(tier):
            raise shortage_error(chunks, plan, shape, budgets, tier=tier, plan_name=plan_name)


def shortage_error(
    chunks: Sequence[ChunkDemand],
    plan: PlacementPlan,
    shape: RuntimeShape,
    budgets: Budgets,
    *,
    tier: MemoryTier,
    plan_name: str,
) -> OutOfTierMemoryError:
    """Return the error that says by how much a tier is short, what takes its bytes and what would fix it.

    Args:
        chunks: the chunks, by id.
        plan: the plan that does not fit.
        shape: sizes of the buffers.
        budgets: bytes per tier.
        tier: the tier that is short.
        plan_name: what the message calls the plan.

    Returns:
        The error, not raised.
    """
    demand = memory_demand(chunks, plan, shape)
    needed, budget = demand.total(tier), budgets.of(tier)
    purposes = sorted(demand.by_purpose[tier].items(), key=lambda item: (-item[1], item[0]))
    takes = ", ".join(f"{purpose} {format_nbytes(nbytes)}" for purpose, nbytes in purposes)
    fixes = _fixes(chunks, plan, shape, budgets, tier=tier)
    return OutOfTierMemoryError(
        f"{tier.value} tier is short by {needed - budget} bytes ({format_nbytes(needed - budget)}): {plan_name} takes "
        f"{format_nbytes(needed)} there ({takes}) and the budget is {format_nbytes(budget)}; " + "; or ".join(fixes)
    )


def _fixes(
    chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape, budgets: Budgets, *, tier: MemoryTier
) -> list[str]:
    demand = memory_demand(chunks, plan, shape)
    needed = demand.total(tier)

    def saved_by(other: RuntimeShape) -> int:
        return needed - memory_demand(chunks, plan, other).total(tier)

    fixes = [f"raise {_BUDGET_NAMES[tier]} to at least {needed} bytes"]
    if tier is MemoryTier.DEVICE:
        fixes[0] = f"raise device_budget or lower activation_reserve until {needed} bytes are left for chunks"
    shared = [d for d, homes in zip(chunks, plan.chunks, strict=True) if has_shared_home(d, homes.working)]
    if tier is MemoryTier.HOST and any(demand.num_sharers < demand.num_ranks for demand in shared):
        fixes.append("set share_frozen=False, which cuts frozen weights over the ranks of all machines")
    if tier is MemoryTier.HOST and budgets.nvme is None:
        fixes.append("add a disk tier, nvme=NVMeConfig(...)")
    itemsizes = [demand.working_itemsize for demand in chunks if demand.is_trainable]
    if itemsizes and min(itemsizes) < shape.grad_itemsize:
        saved = saved_by(dataclasses.replace(shape, grad_itemsize=min(itemsizes)))
        if saved:
            fixes.append(f"set gradient_accumulation=False (saves {format_nbytes(saved)})")
    if "update ring" in demand.by_purpose[tier]:
        if shape.ring_depth > 2:
            saved = saved_by(dataclasses.replace(shape, ring_depth=2))
            fixes.append(f"lower ring_depth to 2 (saves {format_nbytes(saved)})")
        fixes.append("lower tile_numel (the update ring shrinks with it)")
    if plan.num_slots > 2 and "slots" in demand.by_purpose[tier]:
        fixes.append(f"lower prefetch_depth (each slot takes {format_nbytes(plan.slot_nbytes)})")
    return fixes


def _find_problem(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape, budgets: Budgets) -> str | None:
    """Return what is wrong with a chunk's homes, or None."""
    if homes.chunk_id != demand.chunk_id:
        return f"found chunk_id {homes.chunk_id} in its place; list the chunks by id"
    num_tiles = demand.num_tiles(shape.tile_numel)
    if len(homes.working) != num_tiles:
        return f"expected {num_tiles} working tiles, got {len(homes.working)}"
    num_state_tiles = num_tiles if demand.is_trainable else 0
    if len(homes.state) != num_state_tiles:
        return f"expected {num_state_tiles} state tiles, got {len(homes.state)}"
    if (homes.grad is None) == demand.is_trainable:
        return "expected a gradient home exactly for trainable chunks"
    used = {*homes.working, *homes.state} | ({homes.grad} if homes.grad is not None else set())
    if not shape.has_device and MemoryTier.DEVICE in used:
        return "a home is DEVICE but there is no device tier"
    if budgets.nvme is None and MemoryTier.NVME in used:
        return "a home is NVME but there is no disk tier; add nvme=NVMeConfig(...)"
    return _find_contradiction(demand, homes, shape)


def _find_contradiction(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> str | None:
    device = MemoryTier.DEVICE
    for name, tiers in (("working", homes.working), ("state", homes.state)):
        if device in tiers and set(tiers) != {device}:
            return f"the {name} tiles must all live on the device or none of them"
    if demand.is_trainable:
        if (device in homes.working) != (device in homes.state):
            return (
                "working weights live on the device exactly when the state does; for weights that are always there "
                "but are updated elsewhere set working to HOST and is_resident=True"
            )
        if (homes.grad is device) != (device in homes.state):
            return "the gradient lives on the device exactly when the state does"
    if is_used_in_place(demand, homes.working, shape):
        if not homes.is_resident:
            return "all its working weights live in compute memory, so is_resident must be True"
    elif demand.is_sharded and homes.is_resident is not demand.is_pinned:
        return f"with several ranks is_resident must be {demand.is_pinned} for this chunk"
    if not homes.is_resident and demand.is_pinned:
        return "its working weights must always be in compute memory, so is_resident must be True"
    for tile in homes.spares:
        if not 0 <= tile < len(homes.state) or not can_have_spare(demand, homes, tile, shape):
            return f"tile {tile} cannot have a second place; leave it out of spares"
    return None


def _check_slots(chunks: Sequence[ChunkDemand], plan: PlacementPlan, chunks_at_once: int) -> None:
    sizes = [demand.compute_nbytes for demand, homes in zip(chunks, plan.chunks, strict=True) if not homes.is_resident]
    fewest = min(len(sizes), chunks_at_once)
    if plan.num_slots < fewest:
        raise ConfigError(f"PlacementPlan.num_slots: expected at least {fewest}, got {plan.num_slots}")
    if not sizes:
        if plan.num_slots != 0 or plan.slot_nbytes != 0:
            raise ConfigError("PlacementPlan: every chunk is resident, so num_slots and slot_nbytes must be 0")
        return
    smallest = round_up(max(sizes), IO_ALIGNMENT_NBYTES)
    if plan.slot_nbytes < smallest or plan.slot_nbytes % IO_ALIGNMENT_NBYTES:
        raise ConfigError(
            f"PlacementPlan.slot_nbytes: expected a multiple of {IO_ALIGNMENT_NBYTES} of at least {smallest}, "
            f"got {plan.slot_nbytes}"
        )
