"""A plan in the making: homes that may be changed chunk by chunk while the bytes they take are kept up to date."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gemini.placement.check import Budgets
from gemini.placement.plan import (
    ChunkDemand,
    ChunkPlacement,
    DemandTally,
    PlacementPlan,
    RuntimeShape,
    is_used_in_place,
)
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["Draft", "Floor", "Problem", "Role", "draft_smallest", "home_chunk", "move_below"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a placement has to solve."""

    chunks: Sequence[ChunkDemand]
    shape: RuntimeShape
    budgets: Budgets
    fewest_slots: int
    """The least that works, if that many chunks have no residence."""
    most_slots: int
    """As many as prefetching can use."""

    @property
    def compute_tier(self) -> MemoryTier:
        """The tier that forward and backward read."""
        return MemoryTier.DEVICE if self.shape.has_device else MemoryTier.HOST


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The tiers below compute memory where a chunk starts, before anything is promoted."""

    working: MemoryTier
    grad: MemoryTier
    state: MemoryTier


class Role(enum.Enum):
    """How a chunk comes into compute memory."""

    IN_SLOT = "in a slot"
    """Fetched for each use."""
    RESIDENT = "resident"
    """Always there; on a device as a copy of what lives below."""
    ON_DEVICE = "on the device"
    """Lives on the device with its gradient and state."""


class Draft:
    """Homes of all chunks, and the tally of what they take.

    Args:
        problem: chunks, sizes and budgets.
        homes: first homes of all chunks.
        slot_cap: the most slots to take.
    """

    def __init__(self, problem: Problem, homes: Iterable[ChunkPlacement], slot_cap: int) -> None:
        self.problem = problem
        self.homes = list(homes)
        self.slot_cap = slot_cap
        self._tally = DemandTally(problem.shape)
        self._slot_users: Counter[int] = Counter()  # bytes of the chunks that take turns in slots
        for chunk_id in range(len(self.homes)):
            self._count(chunk_id, 1)

    def rehome(self, chunk_id: int, homes: ChunkPlacement) -> None:
        """Replace a chunk's homes."""
        self._count(chunk_id, -1)
        self.homes[chunk_id] = homes
        self._count(chunk_id, 1)

    def total(self, tier: MemoryTier) -> int:
        """Return the bytes taken in a tier."""
        return self._tally.demand(*self._slots()).total(tier)

    def shortage(self, tier: MemoryTier) -> int:
        """Return by how many bytes the draft exceeds a tier's budget."""
        return max(0, self.total(tier) - self.problem.budgets.of(tier))

    def fits(self, *tiers: MemoryTier) -> bool:
        """Return whether the tiers' budgets hold what the draft takes."""
        demand = self._tally.demand(*self._slots())
        return all(demand.total(tier) <= self.problem.budgets.of(tier) for tier in tiers)

    def promote(
        self, order: Iterable[int], change: Callable[[int, ChunkPlacement], ChunkPlacement], tier: MemoryTier
    ) -> None:
        """Change as many chunks as a tier has room for, the longest prefix of an order.

        The bytes taken need not grow with every chunk (the last one may free a shared buffer), so all prefixes are
        tried. More budget therefore never gives a shorter prefix.

        Args:
            order: ids of chunks, the one to promote first at the front.
            change: returns the new homes of a chunk, given its id and its homes; the same object for no change.
            tier: the tier whose budget limits the promotion.
        """
        undo: list[tuple[int, ChunkPlacement]] = []
        num_kept = 0
        for chunk_id in order:
            old = self.homes[chunk_id]
            new = change(chunk_id, old)
            if new is old:
                continue
            self.rehome(chunk_id, new)
            undo.append((chunk_id, old))
            if self.fits(tier):
                num_kept = len(undo)
        for chunk_id, old in undo[num_kept:]:
            self.rehome(chunk_id, old)

    def plan(self) -> PlacementPlan:
        """Return the draft as a plan."""
        num_slots, slot_nbytes = self._slots()
        return PlacementPlan(chunks=tuple(self.homes), num_slots=num_slots, slot_nbytes=slot_nbytes)

    def _slots(self) -> tuple[int, int]:
        num_slots = min(self._slot_users.total(), self.slot_cap)
        return num_slots, round_up(max(self._slot_users, default=0), IO_ALIGNMENT_NBYTES)

    def _count(self, chunk_id: int, sign: int) -> None:
        demand, homes = self.problem.chunks[chunk_id], self.homes[chunk_id]
        if sign > 0:
            self._tally.add(demand, homes)
        else:
            self._tally.remove(demand, homes)
        if not homes.is_resident:
            self._slot_users[demand.compute_nbytes] += sign
            if not self._slot_users[demand.compute_nbytes]:
                del self._slot_users[demand.compute_nbytes]


def home_chunk(problem: Problem, chunk_id: int, role: Role, floor: Floor) -> ChunkPlacement:
    """Return the homes of a chunk in a role, all that is not in compute memory on the floor.

    Args:
        problem: chunks and sizes.
        chunk_id: the chunk.
        role: how it comes into compute memory.
        floor: where the rest of it lives.

    Returns:
        The homes. A frozen chunk that is resident on a device lives there, since no update needs it elsewhere; one that
        is committed never does. Of a sharded chunk the role moves the shard alone; whole, it stays in compute memory
        only if it is pinned or ranks share one copy of it there.
    """
    demand = problem.chunks[chunk_id]
    if role is Role.ON_DEVICE and demand.is_committed:
        role = Role.RESIDENT
    working, grad, state = floor.working, floor.grad, floor.state
    if role is Role.RESIDENT and not (problem.shape.has_device and demand.is_trainable):
        working = problem.compute_tier
    if role is Role.ON_DEVICE:
        working = grad = state = MemoryTier.DEVICE
    num_tiles = demand.num_tiles(problem.shape.tile_numel)
    has_copy = demand.is_pinned if demand.is_sharded else role is not Role.IN_SLOT
    return ChunkPlacement(
        chunk_id=demand.chunk_id,
        working=(working,) * num_tiles,
        state=(state,) * num_tiles if demand.is_trainable else (),
        grad=grad if demand.is_trainable else None,
        is_resident=has_copy or is_used_in_place(demand, (working,), problem.shape),
    )


def draft_smallest(problem: Problem, floor: Floor, slot_cap: int) -> Draft:
    """Return the plan with all on the floor that takes the least compute memory for a number of slots.

    A slot holds the largest chunk that uses slots, so one huge chunk may cost less as a resident than as the measure of
    all slots.

    Args:
        problem: chunks and sizes.
        floor: where everything lives.
        slot_cap: the most slots to take.

    Returns:
        A draft; it need not fit the budgets.
    """
    sizes = sorted(
        round_up(demand.compute_nbytes, IO_ALIGNMENT_NBYTES) for demand in problem.chunks if not demand.is_pinned
    )
    resident_nbytes = sum(sizes)
    least_nbytes, slot_nbytes = resident_nbytes, 0
    for num_users, nbytes in enumerate(sizes, start=1):
        resident_nbytes -= nbytes  # of the chunks above `nbytes`, once the last chunk of this size is reached
        total_nbytes = resident_nbytes + min(num_users, slot_cap) * nbytes
        if total_nbytes < least_nbytes and (num_users == len(sizes) or sizes[num_users] > nbytes):
            least_nbytes, slot_nbytes = total_nbytes, nbytes

    def role_of(demand: ChunkDemand) -> Role:
        is_too_large = demand.compute_nbytes > slot_nbytes and not demand.is_sharded
        return Role.RESIDENT if demand.is_pinned or is_too_large else Role.IN_SLOT

    homes = (home_chunk(problem, i, role_of(demand), floor) for i, demand in enumerate(problem.chunks))
    return Draft(problem, homes, slot_cap)


def move_below(draft: Draft, floor: Floor) -> Draft:
    """Return a draft with the same roles in compute memory and everything below it on a floor.

    Args:
        draft: the roles; there is a device.
        floor: where everything that is not on the device lives.

    Returns:
        A new draft.
    """

    def below(home: ChunkPlacement) -> ChunkPlacement:
        if MemoryTier.DEVICE in home.working:
            return home
        return dataclasses.replace(
            home,
            working=(floor.working,) * len(home.working),
            state=(floor.state,) * len(home.state),
            grad=None if home.grad is None else floor.grad,
        )

    return Draft(draft.problem, map(below, draft.homes), draft.slot_cap)
