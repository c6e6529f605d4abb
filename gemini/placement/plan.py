"""The decision: where each chunk lives, as plain data, and the bytes that follow from it.

The memory model of docs/memory_model.md is `memory_demand` below; everything that allocates is
checked against it. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["ChunkDemand", "ChunkPlacement", "MemoryDemand", "PlacementPlan", "RuntimeShape", "memory_demand"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDemand:
    """What placement needs to know of one chunk."""

    chunk_id: int
    numel: int
    """Elements, padding included."""
    working_itemsize: int
    """Bytes of one working weight."""
    master_itemsize: int
    """Bytes of one master element beside the working weight: 2 for bf16, 4 for float16, 0 for float32 and frozen."""
    is_trainable: bool
    is_pinned: bool
    """Whether the working weights must stay in compute memory all the time (the root unit)."""

    @property
    def working_nbytes(self) -> int:
        """Bytes of the working weights."""
        return self.numel * self.working_itemsize

    @property
    def state_itemsize(self) -> int:
        """Bytes of optimizer state per element: master, momentum and variance."""
        return self.master_itemsize + 8 if self.is_trainable else 0

    def num_tiles(self, tile_numel: int) -> int:
        """Return how many tiles the chunk has; the last one may be shorter."""
        return -(-self.numel // tile_numel)

    def tile_length(self, tile: int, tile_numel: int) -> int:
        """Return the elements of one tile."""
        return min(tile_numel, self.numel - tile * tile_numel)

    def working_tile_nbytes(self, tile: int, tile_numel: int) -> int:
        """Return the bytes of one tile's working weights."""
        return self.tile_length(tile, tile_numel) * self.working_itemsize

    def state_tile_nbytes(self, tile: int, tile_numel: int) -> int:
        """Return the bytes of one tile's state record."""
        return state_record_nbytes(self.tile_length(tile, tile_numel), self.master_itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlacement:
    """The homes of one chunk."""

    chunk_id: int
    working: tuple[MemoryTier, ...]
    """Home of each tile of the working weights, where the optimizer reads and writes them. All DEVICE or none."""
    state: tuple[MemoryTier, ...]
    """Home of each tile of the state; empty for frozen chunks. All DEVICE (then `working` is too) or none."""
    grad: MemoryTier | None
    """Where gradients wait for the update; None for frozen chunks. DEVICE exactly when the state is there."""
    is_resident: bool
    """Whether compute memory always holds the working weights; then fetching them costs nothing."""


@dataclass(frozen=True)
class PlacementPlan:
    """Homes of all chunks and the number and size of the reusable buffers."""

    chunks: tuple[ChunkPlacement, ...]
    """By chunk id."""
    num_slots: int
    """Slots that chunks without a residence take turns in; 0 if every chunk is resident."""
    slot_nbytes: int
    """Bytes of a slot: the largest chunk that is not resident, rounded up to direct I/O's alignment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeShape:
    """Sizes the configuration fixes, apart from any plan."""

    has_device: bool
    """Whether compute memory is a tier of its own (CUDA or the simulated device) or host memory."""
    tile_numel: int
    ring_depth: int
    grad_itemsize: int
    """Bytes of a waiting gradient element: 4 with gradient accumulation, else the working itemsize."""
    num_grad_slots: int = 2
    """Whole-chunk buffers through which gradients travel to a home that backward cannot write to directly."""
    num_fetch_slots: int = 2
    """Host buffers through which working weights travel from disk to a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryDemand:
    """Bytes by tier and purpose that a plan takes; all are allocated at construction."""

    by_purpose: dict[MemoryTier, dict[str, int]]

    def total(self, tier: MemoryTier) -> int:
        """Return a tier's bytes."""
        return sum(self.by_purpose[tier].values())


def state_record_nbytes(length: int, master_itemsize: int) -> int:
    """Return the bytes of a state record of `length` elements: master, momentum, variance, each aligned for direct I/O."""
    return sum(round_up(length * itemsize, IO_ALIGNMENT_NBYTES) for itemsize in (master_itemsize, 4, 4))


def memory_demand(chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape) -> MemoryDemand:
    """Compute the bytes a plan takes in each tier.

    Args:
        chunks: the chunks, by id.
        plan: their homes.
        shape: sizes of the buffers.

    Returns:
        Bytes by tier and purpose. Purposes: "working", "resident copies", "state", "gradients" (homes), "slots",
        "update ring", "gradient slots", "fetch slots".

    Source: docs/memory_model.md.
    """
    compute = MemoryTier.DEVICE if shape.has_device else MemoryTier.HOST
    held: dict[MemoryTier, Counter[str]] = {tier: Counter() for tier in MemoryTier}
    largest: Counter[str] = Counter()
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        for tile, tier in enumerate(homes.working):
            held[tier]["working"] += _aligned(demand.working_tile_nbytes(tile, shape.tile_numel))
        for tile, tier in enumerate(homes.state):
            held[tier]["state"] += demand.state_tile_nbytes(tile, shape.tile_numel)
        if homes.grad is not None:
            held[homes.grad]["gradients"] += _aligned(demand.numel * shape.grad_itemsize)
        if homes.is_resident and set(homes.working) != {compute}:
            held[compute]["resident copies"] += _aligned(demand.working_nbytes)
        for purpose, nbytes in _buffer_needs(demand, homes, shape).items():
            largest[purpose] = max(largest[purpose], nbytes)
    held[compute]["slots"] = plan.num_slots * plan.slot_nbytes
    held[MemoryTier.HOST]["update ring"] = shape.ring_depth * largest["update ring"]
    held[MemoryTier.HOST]["fetch slots"] = shape.num_fetch_slots * largest["fetch slots"]
    held[MemoryTier.DEVICE]["gradient slots"] = shape.num_grad_slots * largest["device gradient slots"]
    held[MemoryTier.HOST]["gradient slots"] = shape.num_grad_slots * (
        largest["device gradient slots"] + largest["disk gradient slots"]
    )
    return MemoryDemand(by_purpose={tier: {k: v for k, v in sums.items() if v} for tier, sums in held.items()})


def _buffer_needs(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> dict[str, int]:
    """Return the bytes of each kind of shared buffer that this chunk needs one of.

    A gradient leaves a device in the working dtype through a device slot and a host slot of equal size; a
    gradient that lives on disk is put together in a host slot of its home's dtype.
    """
    needs = {"update ring": _ring_tile_nbytes(demand, homes, shape)}
    if shape.has_device and MemoryTier.NVME in homes.working:
        needs["fetch slots"] = _aligned(demand.working_nbytes)
    if shape.has_device and homes.grad in (MemoryTier.HOST, MemoryTier.NVME):
        needs["device gradient slots"] = _aligned(demand.working_nbytes)
    if homes.grad is MemoryTier.NVME:
        needs["disk gradient slots"] = _aligned(demand.numel * shape.grad_itemsize)
    return needs


def _aligned(nbytes: int) -> int:
    return round_up(nbytes, IO_ALIGNMENT_NBYTES)


def _ring_tile_nbytes(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> int:
    """Return the largest ring buffer one of the chunk's tiles needs: what is on disk must come to host memory."""
    largest = 0
    for tile, state_tier in enumerate(homes.state):
        nbytes = 0
        if state_tier is MemoryTier.NVME:
            nbytes += demand.state_tile_nbytes(tile, shape.tile_numel)
        if homes.working[tile] is MemoryTier.NVME:
            nbytes += _aligned(demand.working_tile_nbytes(tile, shape.tile_numel))
        if homes.grad is MemoryTier.NVME:
            nbytes += _aligned(demand.tile_length(tile, shape.tile_numel) * shape.grad_itemsize)
        largest = max(largest, nbytes)
    return largest
