"""Second places for tiles, so that an update may run before it is known whether it will count: which tiles get one.

On disk a second place costs nothing but disk space. In host memory it costs room that nothing else needs: first for the
weights of tiles whose state is on disk (2 bytes an element let the disk work during backward), then for weights and
state that are both in host memory. Nothing here moves anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from gemini.placement.check import Budgets
from gemini.placement.plan import (
    ChunkDemand,
    ChunkPlacement,
    PlacementPlan,
    RuntimeShape,
    can_have_spare,
    memory_demand,
    spare_nbytes,
)
from gemini.tiers import MemoryTier, checksum_nbytes

__all__ = ["HOST_SPARE_SHARE", "add_spares", "kept_for_slots_nbytes", "room_for_states"]

HOST_SPARE_SHARE = 0.5
"""Share of the elements of a kind that get second places in host memory. The rest is updated behind the next forward,
which is a quarter of a step to a third; less than a half would leave updates that nothing hides."""

_HOST, _NVME = MemoryTier.HOST, MemoryTier.NVME
_IsKind = Callable[[ChunkPlacement, int], bool]


def add_spares(
    chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape, budgets: Budgets, *, must_fit: bool
) -> PlacementPlan:
    """Give tiles second places where there is room.

    Chunks come from the last to the first: backward reaches them in that order, so their updates have longest.

    Args:
        chunks: the chunks, by id.
        plan: their homes; chunks that have second places already keep them.
        shape: sizes of the buffers.
        budgets: bytes per tier, which `plan` fits.
        must_fit: give second places to all tiles that need disk space only, whether it is there or not: the caller
            checks the plan and reports what is missing.

    Returns:
        The plan with more second places.
    """
    if not shape.has_spares:
        return plan
    held = memory_demand(chunks, plan, shape)
    room = _Room(
        host=budgets.host - held.total(_HOST) - kept_for_slots_nbytes(chunks, shape),
        nvme=budgets.of(_NVME) - held.total(_NVME),
        disk_nbytes=held.total(_NVME),
        has_checksums=shape.has_checksums,
    )
    spares = {homes.chunk_id: set(homes.spares) for homes in plan.chunks}
    for kind in _kinds_of_tiles(chunks, plan, shape):
        left_numel = HOST_SPARE_SHARE * sum(chunks[i].tile_length(tile, shape.tile_numel) for i, tile in kind)
        for chunk_id, tile in kind:
            demand, homes = chunks[chunk_id], plan.chunks[chunk_id]
            needed = {tier: spare_nbytes(demand, homes, (tile,), shape, tier).total for tier in (_HOST, _NVME)}
            if tile in spares[chunk_id] or (needed[_HOST] and left_numel <= 0):
                continue
            if room.take(needed) or (must_fit and not needed[_HOST]):
                spares[chunk_id].add(tile)
                left_numel -= demand.tile_length(tile, shape.tile_numel)
    homes_of_all = tuple(
        dataclasses.replace(homes, spares=tuple(sorted(spares[homes.chunk_id]))) for homes in plan.chunks
    )
    return dataclasses.replace(plan, chunks=homes_of_all)


def room_for_states(free_nbytes: int, state_nbytes: int, working_nbytes: int) -> int:
    """Return how much of some free host memory states may take that would else be on disk.

    Where not all of them fit, room is left for second places of the weights of those that stay on disk.

    Args:
        free_nbytes: what is free.
        state_nbytes: bytes of all these states.
        working_nbytes: bytes of the weights they belong to, as far as second places may be made for them.

    Returns:
        At most `free_nbytes`.
    """
    spares_nbytes = int(HOST_SPARE_SHARE * working_nbytes)
    if state_nbytes <= free_nbytes or state_nbytes <= spares_nbytes:
        return free_nbytes
    # Of a share x of the states in host memory: x * states + (1 - x) * spares = free.
    share = max(0, free_nbytes - spares_nbytes) / (state_nbytes - spares_nbytes)
    return int(share * state_nbytes)


def kept_for_slots_nbytes(chunks: Sequence[ChunkDemand], shape: RuntimeShape) -> int:
    """Return the bytes that second places leave free: for slots, in case the memory of weights is not page-locked."""
    if not shape.has_device:
        return 0
    return shape.num_fetch_slots * max((demand.compute_nbytes for demand in chunks), default=0)


@dataclasses.dataclass(slots=True, kw_only=True)
class _Room:
    """What is left of the budgets."""

    host: int
    nvme: int
    disk_nbytes: int
    has_checksums: bool

    def take(self, needed: dict[MemoryTier, int]) -> bool:
        """Take bytes from both tiers if both have them; return whether that was so."""
        disk_nbytes = self.disk_nbytes + needed[_NVME]
        host = needed[_HOST]
        if self.has_checksums and needed[_NVME]:
            host += checksum_nbytes(disk_nbytes) - checksum_nbytes(self.disk_nbytes)
        if host > self.host or needed[_NVME] > self.nvme:
            return False
        self.host -= host
        self.nvme -= needed[_NVME]
        self.disk_nbytes = disk_nbytes
        return True


def _kinds_of_tiles(
    chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape
) -> Iterator[list[tuple[int, int]]]:
    """Yield tiles that may have a second place, as pairs of chunk and tile, the cheapest kind first."""

    def tiles(is_kind: _IsKind) -> list[tuple[int, int]]:
        return [
            (homes.chunk_id, tile)
            for demand, homes in zip(reversed(chunks), reversed(plan.chunks), strict=True)
            for tile in range(len(homes.state))
            if can_have_spare(demand, homes, tile, shape) and is_kind(homes, tile)
        ]

    yield tiles(lambda homes, tile: (homes.state[tile], homes.working[tile]) == (_NVME, _NVME))
    yield tiles(lambda homes, tile: (homes.state[tile], homes.working[tile]) == (_NVME, _HOST))
    yield tiles(lambda homes, tile: homes.state[tile] is _HOST)
