"""Automatic placement: start from the least that works, then let everything rise to the fastest tier with room.

On a device the order of promotion is: all of a model that fits; residency of working weights; gradients and state of
resident chunks. Below it: working weights, gradients, state. Within each kind chunks go from the last of the layout to
the first. Nothing here moves anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

from gemini.errors import ConfigError, OutOfTierMemoryError
from gemini.placement.check import Budgets, check_plan, shortage_error
from gemini.placement.draft import Draft, Floor, Problem, Role, draft_smallest, home_chunk, move_below
from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape, can_have_spare
from gemini.placement.spares import kept_for_slots_nbytes, room_for_states
from gemini.tiers import MemoryTier

__all__ = ["auto_placement"]

_HOST, _NVME = MemoryTier.HOST, MemoryTier.NVME
_HOST_FLOOR = Floor(working=_HOST, grad=_HOST, state=_HOST)


def auto_placement(
    chunks: Sequence[ChunkDemand],
    shape: RuntimeShape,
    budgets: Budgets,
    *,
    prefetch_depth: int,
    chunks_at_once: int = 2,
) -> PlacementPlan:
    """Choose homes that fill the fastest tiers the budgets allow.

    Args:
        chunks: the chunks, by id.
        shape: sizes of the buffers.
        budgets: bytes per tier.
        prefetch_depth: chunks to be fetched ahead; two slots more than that are taken where they fit.
        chunks_at_once: the most chunks without a residence that must be in compute memory at the same time; no plan has
            fewer slots than that.

    Returns:
        The plan. Equal arguments give equal plans, so all ranks decide alike.

    Raises:
        ConfigError: the budgets name a device and the shape has none, or the other way round.
        OutOfTierMemoryError: even the smallest plan does not fit.
    """
    if shape.has_device != (budgets.device is not None):
        raise ConfigError(f"Budgets.device: expected bytes exactly when there is a device tier, got {budgets.device!r}")
    fewest = max(chunks_at_once, 2)
    most = max(prefetch_depth + 2, fewest)
    problem = Problem(chunks=chunks, shape=shape, budgets=budgets, fewest_slots=fewest, most_slots=most)
    draft = _place_with_device(problem) if shape.has_device else _place_on_cpu(problem)
    plan = draft.plan()
    check_plan(chunks, plan, shape, budgets, chunks_at_once=chunks_at_once)
    return plan


def _place_on_cpu(problem: Problem) -> Draft:
    homes = (home_chunk(problem, i, Role.RESIDENT, _HOST_FLOOR) for i in range(len(problem.chunks)))
    all_in_host = Draft(problem, homes, problem.most_slots)
    if all_in_host.fits(_HOST):
        return all_in_host
    if problem.budgets.nvme is None:
        raise _shortage(all_in_host)
    floor = min(_floors(problem), key=lambda floor: _draft_least(problem, floor, problem.fewest_slots).total(_HOST))
    draft = _draft_residents(problem, floor)
    _promote_updates(draft, _promotion_order(problem))
    if not draft.fits(_NVME):
        raise _shortage(draft)
    return draft


def _place_with_device(problem: Problem) -> Draft:
    homes = (home_chunk(problem, i, Role.ON_DEVICE, _HOST_FLOOR) for i in range(len(problem.chunks)))
    everything = Draft(problem, homes, problem.most_slots)
    if everything.fits(MemoryTier.DEVICE, _HOST):
        return everything
    # A resident's copy spares uploads, yet what lives below takes as much room as before. When the tiers below are
    # short, the device takes whole chunks instead.
    drafts = []
    for fill_device in (_fill_device_with_residents, _fill_device_with_states):
        drafts.append(_fill_below(fill_device(problem)))
        if drafts[-1].fits(_HOST, _NVME):
            return drafts[-1]
    raise _shortage(min(drafts, key=lambda draft: [draft.shortage(tier) for tier in (_HOST, _NVME)]))


def _fill_device_with_residents(problem: Problem) -> Draft:
    draft = _draft_residents(problem, _HOST_FLOOR)
    if draft.slot_cap == problem.most_slots:
        chunks = problem.chunks
        order = _promotion_order(problem)
        _promote_to_device(draft, [i for i in order if draft.homes[i].is_resident or chunks[i].is_sharded])
    return draft


def _fill_device_with_states(problem: Problem) -> Draft:
    draft = _draft_smallest_that_fits(problem, _HOST_FLOOR)
    order = _promotion_order(problem)
    _promote_to_device(draft, sorted(order, key=lambda i: not draft.homes[i].is_resident))
    _promote_residents(draft, order, _HOST_FLOOR)
    return draft


def _fill_below(upper: Draft) -> Draft:
    """Return the best placement below the device for given roles on it; over a budget only if all are."""
    problem = upper.problem
    if upper.fits(_HOST):
        return upper
    drafts = [move_below(upper, floor) for floor in _floors(problem)]
    for draft in drafts:
        _keep_largest_gradients(draft)
    draft = min(drafts, key=lambda draft: draft.total(_HOST))
    if not draft.fits(_HOST):
        return draft

    def working_to_host(_: int, homes: ChunkPlacement) -> ChunkPlacement:
        if _NVME not in homes.working:
            return homes
        return dataclasses.replace(homes, working=(_HOST,) * len(homes.working))

    order = _promotion_order(problem)
    draft.promote(sorted(order, key=lambda i: draft.homes[i].is_resident), working_to_host, _HOST)
    _promote_updates(draft, order)
    return draft


def _draft_smallest_that_fits(problem: Problem, floor: Floor) -> Draft:
    """Return the smallest plan in compute memory with as many slots as fit."""
    for slot_cap in range(problem.most_slots, problem.fewest_slots - 1, -1):
        draft = _draft_least(problem, floor, slot_cap)
        if draft.fits(problem.compute_tier):
            return draft
    raise _shortage(draft)


def _draft_least(problem: Problem, floor: Floor, slot_cap: int) -> Draft:
    """Return the plan from a floor that takes the least host memory beside the least compute memory."""
    draft = draft_smallest(problem, floor, slot_cap)
    _keep_largest_gradients(draft)
    return draft


def _keep_largest_gradients(draft: Draft) -> None:
    """Let the largest gradients wait in host memory where the slots that take them to disk are larger than they are."""
    on_disk = [i for i, homes in enumerate(draft.homes) if homes.grad is _NVME]
    for chunk_id in sorted(on_disk, key=lambda i: -draft.problem.chunks[i].numel):
        homes, before = draft.homes[chunk_id], draft.total(_HOST)
        draft.rehome(chunk_id, dataclasses.replace(homes, grad=_HOST))
        if draft.total(_HOST) > before:
            draft.rehome(chunk_id, homes)
            return


def _draft_residents(problem: Problem, floor: Floor) -> Draft:
    """Return the smallest plan that fits compute memory, with as many residents as its budget allows.

    Slots come before residents: with fewer slots than prefetching can use nothing is promoted, which keeps the set of
    residents from shrinking when the budget grows.
    """
    draft = _draft_smallest_that_fits(problem, floor)
    if draft.slot_cap == problem.most_slots:
        _promote_residents(draft, _promotion_order(problem), floor)
    return draft


def _promote_residents(draft: Draft, order: Sequence[int], floor: Floor) -> None:
    draft.promote(
        order,
        lambda i, homes: homes if homes.is_resident else _reside(draft.problem, i, floor),
        draft.problem.compute_tier,
    )


def _reside(problem: Problem, chunk_id: int, floor: Floor) -> ChunkPlacement:
    return home_chunk(problem, chunk_id, Role.RESIDENT, floor)


def _promote_to_device(draft: Draft, order: Sequence[int]) -> None:
    def to_device(chunk_id: int, homes: ChunkPlacement) -> ChunkPlacement:
        if MemoryTier.DEVICE in homes.working:
            return homes
        return home_chunk(draft.problem, chunk_id, Role.ON_DEVICE, _HOST_FLOOR)

    draft.promote(order, to_device, MemoryTier.DEVICE)


def _promote_updates(draft: Draft, order: Sequence[int]) -> None:
    """Bring gradients, then tiles of state, from disk to host memory while there is room."""

    def grad_to_host(_: int, homes: ChunkPlacement) -> ChunkPlacement:
        return dataclasses.replace(homes, grad=_HOST) if homes.grad is _NVME else homes

    draft.promote(order, grad_to_host, _HOST)
    free_nbytes = _room_for_states(draft)
    for chunk_id in order:
        homes = draft.homes[chunk_id]
        if _NVME in homes.state:
            num_tiles, taken_nbytes = _tiles_that_fit(draft.problem, chunk_id, free_nbytes)
            free_nbytes -= taken_nbytes
            state = (_HOST,) * num_tiles + (_NVME,) * (len(homes.state) - num_tiles)
            draft.rehome(chunk_id, dataclasses.replace(homes, state=state))


def _room_for_states(draft: Draft) -> int:
    """Return the host memory that states may take which are on disk."""
    shape, chunks = draft.problem.shape, draft.problem.chunks
    free_nbytes = draft.problem.budgets.of(_HOST) - draft.total(_HOST)
    state_nbytes = working_nbytes = 0
    for demand, homes in zip(chunks, draft.homes, strict=True):
        for tile, tier in enumerate(homes.state):
            if tier is not _NVME:
                continue
            state_nbytes += demand.state_tile_nbytes(tile, shape.tile_numel)
            if homes.working[tile] is _HOST and shape.has_spares and can_have_spare(demand, homes, tile, shape):
                working_nbytes += demand.working_tile_nbytes(tile, shape.tile_numel)
    if not working_nbytes or state_nbytes <= free_nbytes:
        return free_nbytes
    kept_nbytes = min(free_nbytes, kept_for_slots_nbytes(chunks, shape))  # which second places leave free
    return room_for_states(free_nbytes - kept_nbytes, state_nbytes, working_nbytes)


def _tiles_that_fit(problem: Problem, chunk_id: int, free_nbytes: int) -> tuple[int, int]:
    """Return how many of a chunk's first state tiles fit, and their bytes."""
    demand, tile_numel = problem.chunks[chunk_id], problem.shape.tile_numel
    num_full = demand.num_tiles(tile_numel) - 1
    full_nbytes = demand.state_tile_nbytes(0, tile_numel)
    last_nbytes = demand.state_tile_nbytes(num_full, tile_numel)
    num_tiles = min(num_full, free_nbytes // full_nbytes)
    taken_nbytes = num_tiles * full_nbytes
    if num_tiles == num_full and taken_nbytes + last_nbytes <= free_nbytes:
        return num_tiles + 1, taken_nbytes + last_nbytes
    return num_tiles, taken_nbytes


def _floors(problem: Problem) -> list[Floor]:
    """Return where things may start. Disk needs buffers in host memory, for few chunks more than it saves there."""
    tiers = (_HOST,) if problem.budgets.nvme is None else (_HOST, _NVME)
    return [Floor(working=working, grad=grad, state=state) for working, grad, state in product(tiers, repeat=3)]


def _promotion_order(problem: Problem) -> list[int]:
    """Return chunk ids from the turn of the step, where forward ends and backward begins, to its start."""
    return list(range(len(problem.chunks) - 1, -1, -1))


def _shortage(draft: Draft) -> OutOfTierMemoryError:
    """Return the error for the first tier that a draft exceeds."""
    problem = draft.problem
    tier = next(tier for tier in MemoryTier if not draft.fits(tier))
    return shortage_error(
        problem.chunks, draft.plan(), problem.shape, problem.budgets, tier=tier, plan_name="the smallest plan"
    )
