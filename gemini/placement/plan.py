"""The decision: where each chunk lives, as plain data, and the bytes that follow from it.

The memory model of docs/memory_model.md is `memory_demand` below; everything that allocates is
checked against it. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, TileGrid, checksum_nbytes, round_up

__all__ = [
    "ChunkDemand",
    "ChunkPlacement",
    "DemandTally",
    "MemoryDemand",
    "PlacementPlan",
    "RuntimeShape",
    "can_have_spare",
    "has_shared_home",
    "is_read_by_ranks",
    "is_used_in_place",
    "memory_demand",
    "spare_nbytes",
    "state_record_nbytes",
]

_TIERS = tuple(MemoryTier)

EXCHANGE_PIECE_NBYTES = 32 << 20
"""Bytes of gradients that ranks exchange at once if nothing asks for more: long messages reach full bandwidth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDemand:
    """What placement needs to know of one chunk."""

    chunk_id: int
    numel: int
    """Elements that live here, padding included: all of the chunk's or, with several ranks, this rank's shard."""
    working_itemsize: int
    """Bytes of one working weight."""
    master_itemsize: int
    """Bytes of one master element beside the working weight: 2 for bf16, 4 for float16, 0 for float32 and frozen."""
    is_trainable: bool
    is_pinned: bool
    """Whether the working weights must stay in compute memory all the time (the root unit)."""
    is_sharded: bool = False
    """Whether only a shard lives here. Compute memory then holds copies of whole chunks, never homes."""
    num_ranks: int = 1
    """Ranks that own a shard each."""
    num_sharers: int = 1
    """Ranks of this machine that share one copy of the whole chunk if all of it lives in host memory; of frozen chunks
    only. 1: each rank has its shard there."""
    keeps_whole_gradient: bool = False
    """Whether compute memory holds the whole chunk's gradient until the step; of sharded chunks only."""
    is_committed: bool = False
    """Whether it is to outlive the process, so that nothing of it may live on a device."""
    has_one_param: bool = False
    """Whether the chunk is one parameter's alone, whose gradient autograd makes in one piece."""

    @property
    def working_nbytes(self) -> int:
        """Bytes of the working weights that live here."""
        return self.numel * self.working_itemsize

    @property
    def compute_nbytes(self) -> int:
        """Bytes of the whole chunk's working weights in compute memory."""
        return self.num_ranks * self.working_nbytes

    @property
    def share_nbytes(self) -> int:
        """Bytes that each rank counts for a whole chunk that ranks of this machine share."""
        return _aligned(-(-self.compute_nbytes // self.num_sharers))

    def grad_itemsize(self, shape: RuntimeShape) -> int:
        """Return the bytes of a waiting gradient element: never less than of a working weight."""
        return max(shape.grad_itemsize, self.working_itemsize)

    def num_tiles(self, tile_numel: int) -> int:
        """Return how many tiles the chunk has; the last one may be shorter."""
        return TileGrid(self.numel, tile_numel).num_tiles

    def tile_length(self, tile: int, tile_numel: int) -> int:
        """Return the elements of one tile."""
        return TileGrid(self.numel, tile_numel).length_of(tile)

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
    """Home of each tile of the working weights, where the optimizer reads and writes them. All DEVICE or none; a
    trainable chunk's are DEVICE exactly when its state is."""
    state: tuple[MemoryTier, ...]
    """Home of each tile of the state; empty for frozen chunks. All DEVICE (then `working` is too) or none."""
    grad: MemoryTier | None
    """Where gradients wait for the update; None for frozen chunks. DEVICE exactly when the state is there."""
    is_resident: bool
    """Whether compute memory always holds the working weights; then fetching them costs nothing. True where all of
    `working` is in compute memory; elsewhere it costs a copy there. A chunk with several ranks always needs the copy
    and has it exactly if it is pinned, except where ranks share one copy of it in compute memory itself."""
    spares: tuple[int, ...] = ()
    """Tiles that have a second place for weights and state, each in the tier of the first, so that an update may run
    before it is known whether it will count."""


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
    """Bytes of a waiting gradient element: 4 with gradient accumulation, else the working dtype's. Chunks whose own
    dtype is wider have more, see `ChunkDemand.grad_itemsize`."""
    num_grad_slots: int = 2
    """Whole-chunk buffers through which gradients travel to a home that backward cannot write to directly."""
    num_fetch_slots: int = 2
    """Host buffers through which working weights travel from disk to a device."""
    has_spares: bool = False
    """Whether tiles may be given second places."""
    meets_in_host: bool = False
    """Whether ranks share host memory in which gradients are added up, so that nothing is received elsewhere, and
    weights are read by all."""
    has_checksums: bool = False
    """Whether host memory holds checksums of what is on disk."""
    commits_nbytes: int = 0
    """Bytes of a commit file beside the homes and the ring in it; 0: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryDemand:
    """Bytes by tier and purpose that a plan takes; all are allocated at construction."""

    by_purpose: dict[MemoryTier, dict[str, int]]

    def total(self, tier: MemoryTier) -> int:
        """Return a tier's bytes."""
        return sum(self.by_purpose[tier].values())


def state_record_nbytes(length: int, master_itemsize: int) -> int:
    """Return the bytes of a state record of `length` elements: master, momentum, variance, each direct-I/O aligned."""
    return _aligned(length * master_itemsize) + 2 * _aligned(length * 4)


def has_shared_home(demand: ChunkDemand, working: Sequence[MemoryTier]) -> bool:
    """Return whether a chunk whose tiles live in `working` is there once, whole, for several ranks of a machine."""
    return demand.num_sharers > 1 and working.count(MemoryTier.HOST) == len(working)


def is_read_by_ranks(demand: ChunkDemand, working: Sequence[MemoryTier], shape: RuntimeShape) -> bool:
    """Return whether other ranks read a shard whose tiles live in `working` right there, when they gather the chunk."""
    is_in_reach = shape.meets_in_host and demand.is_sharded and not demand.is_committed
    is_cut = not has_shared_home(demand, working)
    return is_in_reach and is_cut and working.count(MemoryTier.HOST) == len(working)


def is_used_in_place(demand: ChunkDemand, working: Sequence[MemoryTier], shape: RuntimeShape) -> bool:
    """Return whether forward and backward read a chunk whose tiles live in `working` right there."""
    compute = MemoryTier.DEVICE if shape.has_device else MemoryTier.HOST
    is_whole = not demand.is_sharded or has_shared_home(demand, working)
    return is_whole and working.count(compute) == len(working)


def can_have_spare(demand: ChunkDemand, homes: ChunkPlacement, tile: int, shape: RuntimeShape) -> bool:
    """Return whether a tile may have a second place: its update can run while others read the first.

    What compute uses in place cannot move. Without a device nothing but what is on disk gains: updates in host memory
    take the processors that compute. A resident copy is refreshed from host memory, not from disk.
    """
    tiers = (homes.state[tile], homes.working[tile])
    if MemoryTier.DEVICE in tiers or is_used_in_place(demand, homes.working, shape):
        return False
    if has_shared_home(demand, homes.working) or is_read_by_ranks(demand, homes.working, shape):
        return False
    if tiers == (MemoryTier.NVME, MemoryTier.NVME):
        return not homes.is_resident
    return shape.has_device and homes.working[tile] is MemoryTier.HOST and not (demand.is_sharded and homes.is_resident)


def spare_nbytes(
    demand: ChunkDemand, homes: ChunkPlacement, tiles: Sequence[int], shape: RuntimeShape, tier: MemoryTier
) -> SpareBytes:
    """Return the bytes that second places of some tiles take in a tier."""
    working = [_aligned(demand.working_tile_nbytes(t, shape.tile_numel)) for t in tiles if homes.working[t] is tier]
    state = [demand.state_tile_nbytes(t, shape.tile_numel) for t in tiles if homes.state[t] is tier]
    return SpareBytes(sum(working), sum(state))


class SpareBytes(NamedTuple):
    """Bytes of second places."""

    working: int
    state: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.working + self.state


def memory_demand(chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape) -> MemoryDemand:
    """Compute the bytes a plan takes in each tier.

    Args:
        chunks: the chunks, by id.
        plan: their homes.
        shape: sizes of the buffers.

    Returns:
        Bytes by tier and purpose. Purposes: "working", "shared weights", "state", "gradients" (homes), "spares" (second
        places of working weights), "state spares",
        "resident copies", "whole gradients", "slots", "update ring", "gradient slots", "exchange slots", "fetch slots",
        "checksums", "commits".

    Source: docs/memory_model.md.
    """
    tally = DemandTally(shape)
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        tally.add(demand, homes)
    return tally.demand(plan.num_slots, plan.slot_nbytes)


class DemandTally:
    """The formula as a running sum, so that a search may change one chunk's homes without counting all anew.

    Args:
        shape: sizes of the buffers.
    """

    def __init__(self, shape: RuntimeShape) -> None:
        self._shape = shape
        self._compute = MemoryTier.DEVICE if shape.has_device else MemoryTier.HOST
        self._held: dict[MemoryTier, Counter[str]] = {tier: Counter() for tier in _TIERS}
        self._needs: dict[str, Counter[int]] = {}  # of each kind of shared buffer: how many chunks need which bytes

    def add(self, demand: ChunkDemand, homes: ChunkPlacement) -> None:
        """Count a chunk."""
        self._count(demand, homes, 1)

    def remove(self, demand: ChunkDemand, homes: ChunkPlacement) -> None:
        """Take back what `add` counted for the same chunk and homes."""
        self._count(demand, homes, -1)

    def demand(self, num_slots: int, slot_nbytes: int) -> MemoryDemand:
        """Return the bytes of all chunks counted, with the buffers they share."""
        shape = self._shape
        largest = {purpose: max(sizes, default=0) for purpose, sizes in self._needs.items()}
        device_gradient = largest.get("device gradient slots", 0)
        by_purpose = {tier: dict(sums) for tier, sums in self._held.items()}
        host, device = by_purpose[MemoryTier.HOST], by_purpose[MemoryTier.DEVICE]
        by_purpose[self._compute]["slots"] = num_slots * slot_nbytes
        for tier, nbytes in exchange_nbytes(largest.get("exchange slots", 0), shape).items():
            by_purpose[tier]["exchange slots"] = nbytes
        host["update ring"] = shape.ring_depth * largest.get("update ring", 0)
        host["fetch slots"] = shape.num_fetch_slots * largest.get("fetch slots", 0)
        host["gradient slots"] = shape.num_grad_slots * (device_gradient + largest.get("disk gradient slots", 0))
        device["gradient slots"] = shape.num_grad_slots * device_gradient
        disk_nbytes = sum(by_purpose[MemoryTier.NVME].values())
        host["checksums"] = checksum_nbytes(disk_nbytes) if shape.has_checksums and disk_nbytes else 0
        host["commits"] = shape.commits_nbytes
        return MemoryDemand(
            by_purpose={tier: {purpose: n for purpose, n in sums.items() if n} for tier, sums in by_purpose.items()}
        )

    def _count(self, demand: ChunkDemand, homes: ChunkPlacement, sign: int) -> None:
        shape, held = self._shape, self._held
        lengths = _tile_lengths(demand, shape.tile_numel)
        working_nbytes = [_aligned(length * demand.working_itemsize) for length in lengths]
        state_nbytes = [state_record_nbytes(length, demand.master_itemsize) for length in lengths]
        is_shared = has_shared_home(demand, homes.working)
        if is_shared:
            held[MemoryTier.HOST]["shared weights"] += sign * demand.share_nbytes
        kinds = (("working", () if is_shared else homes.working, working_nbytes), ("state", homes.state, state_nbytes))
        for purpose, tiers, (full_nbytes, last_nbytes) in kinds:
            for tier in _TIERS:
                num_tiles = tiers.count(tier)
                if num_tiles:
                    missing = full_nbytes - last_nbytes if tiers[-1] is tier else 0
                    held[tier][purpose] += sign * (num_tiles * full_nbytes - missing)
        for tier in (MemoryTier.HOST, MemoryTier.NVME) if homes.spares else ():
            spares = spare_nbytes(demand, homes, homes.spares, shape, tier)
            held[tier]["spares"] += sign * spares.working
            held[tier]["state spares"] += sign * spares.state
        if homes.grad is not None:
            held[homes.grad]["gradients"] += sign * _aligned(demand.numel * demand.grad_itemsize(shape))
        if homes.is_resident and not is_used_in_place(demand, homes.working, shape):
            held[self._compute]["resident copies"] += sign * _aligned(demand.compute_nbytes)
        if homes.grad is not None and demand.keeps_whole_gradient:
            whole_nbytes = demand.num_ranks * demand.numel * demand.grad_itemsize(shape)
            held[self._compute]["whole gradients"] += sign * _aligned(whole_nbytes)
        for purpose, needed in _buffer_needs(demand, homes, shape).items():
            sizes = self._needs.setdefault(purpose, Counter())
            sizes[needed] += sign
            if not sizes[needed]:
                del sizes[needed]


def _tile_lengths(demand: ChunkDemand, tile_numel: int) -> tuple[int, int]:
    """Return the elements of a tile that is not the last, and of the last."""
    return tile_numel, demand.tile_length(demand.num_tiles(tile_numel) - 1, tile_numel)


def _buffer_needs(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> dict[str, int]:
    """Return the bytes of each kind of shared buffer that this chunk needs one of.

    A gradient leaves a device in the working dtype through a device slot and a host slot of equal size; a
    gradient that lives on disk is put together in a host slot of its home's dtype. Ranks exchange gradients in the
    working dtype, each sending a whole chunk and receiving as much; or pieces of it, if it lies whole elsewhere.
    """
    needs = {"update ring": _ring_tile_nbytes(demand, homes, shape)}
    if shape.has_device and MemoryTier.NVME in homes.working:
        needs["fetch slots"] = _aligned(demand.working_nbytes)
    is_summed_on_host = demand.is_sharded and shape.meets_in_host
    if shape.has_device and homes.grad in (MemoryTier.HOST, MemoryTier.NVME) and not is_summed_on_host:
        needs["device gradient slots"] = _aligned(demand.working_nbytes)
    if homes.grad is MemoryTier.NVME:
        needs["disk gradient slots"] = _aligned(demand.numel * demand.grad_itemsize(shape))
    if demand.is_sharded and homes.grad is not None:
        is_elsewhere = demand.keeps_whole_gradient or demand.has_one_param
        nbytes = min(demand.compute_nbytes, EXCHANGE_PIECE_NBYTES) if is_elsewhere else demand.compute_nbytes
        needs["exchange slots"] = _aligned(nbytes)
    return needs


def exchange_nbytes(slot_nbytes: int, shape: RuntimeShape) -> dict[MemoryTier, int]:
    """Return the bytes by tier that exchanges of gradients take.

    By collectives, compute memory has two buffers for each slot: what is sent and what is received. In host memory the
    ranks see what is sent there, and a page of marks: the slots are compute memory themselves on the CPU, and copied
    from a device.

    Args:
        slot_nbytes: bytes of a slot; 0: nothing is exchanged.
        shape: sizes of the buffers.

    Returns:
        Bytes by tier.
    """
    if not slot_nbytes:
        return {}
    slots_nbytes = shape.num_grad_slots * slot_nbytes
    if not shape.meets_in_host:
        return {MemoryTier.DEVICE if shape.has_device else MemoryTier.HOST: 2 * slots_nbytes}
    meeting = {MemoryTier.HOST: slots_nbytes + IO_ALIGNMENT_NBYTES}
    return meeting | {MemoryTier.DEVICE: slots_nbytes} if shape.has_device else meeting


def _ring_tile_nbytes(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> int:
    """Return the largest ring buffer one of the chunk's tiles needs: what is on disk must come to host memory."""
    if not homes.state:  # frozen: nothing is updated
        return 0
    full_numel, last_numel = _tile_lengths(demand, shape.tile_numel)
    last_pair = (homes.state[-1], homes.working[-1])
    full_pairs = _distinct_pairs(homes.state[:-1], homes.working[:-1])
    largest = 0
    for length, pairs in ((full_numel, full_pairs), (last_numel, {last_pair})):
        for state_tier, working_tier in pairs:
            nbytes = state_record_nbytes(length, demand.master_itemsize) if state_tier is MemoryTier.NVME else 0
            if working_tier is MemoryTier.NVME:
                nbytes += _aligned(length * demand.working_itemsize)
            if homes.grad is MemoryTier.NVME:
                nbytes += _aligned(length * demand.grad_itemsize(shape))
            largest = max(largest, nbytes)
    return largest


def _distinct_pairs(
    state: tuple[MemoryTier, ...], working: tuple[MemoryTier, ...]
) -> set[tuple[MemoryTier, MemoryTier]]:
    """Return the combinations of tiers that tiles have; quick for the usual chunk, which has one."""
    if state and state.count(state[0]) == len(state) and working.count(working[0]) == len(working):
        return {(state[0], working[0])}
    return set(zip(state, working, strict=True))


def _aligned(nbytes: int) -> int:
    return round_up(nbytes, IO_ALIGNMENT_NBYTES)


def largest_buffers(chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape) -> dict[str, int]:
    """Return the bytes of one shared buffer of each kind, 0 where none is needed.

    Args:
        chunks: the chunks, by id.
        plan: their homes.
        shape: sizes of the buffers.

    Returns:
        Bytes of one of the "update ring", the "fetch slots", the "device gradient slots", the "disk gradient slots" and
        the "exchange slots".
    """
    kinds = ("update ring", "fetch slots", "device gradient slots", "disk gradient slots", "exchange slots")
    largest = dict.fromkeys(kinds, 0)
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        for kind, nbytes in _buffer_needs(demand, homes, shape).items():
            largest[kind] = max(largest[kind], nbytes)
    return largest
