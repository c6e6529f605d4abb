"""What holds for placement whatever the model, the buffers and the budgets are."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.errors import OutOfTierMemoryError
from gemini.placement import (
    Budgets,
    ChunkDemand,
    ChunkPlacement,
    PlacementPlan,
    RuntimeShape,
    StaticPlacement,
    auto_placement,
    check_plan,
    memory_demand,
    static_placement,
)
from gemini.placement.plan import can_have_spare
from gemini.placement.spares import HOST_SPARE_SHARE, add_spares, room_for_states
from gemini.tiers import MemoryTier, round_up

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME


UNLIMITED = 1 << 40
quickly = settings(max_examples=60)


@st.composite
def models(draw: st.DrawFn, *, max_chunks: int = 8, equal_chunks: bool = False) -> list[ChunkDemand]:
    num_chunks = draw(st.integers(1, max_chunks))
    num_pinned = draw(st.integers(0, min(2, num_chunks)))
    working, master = draw(st.sampled_from([(2, 2), (2, 4), (4, 0)]))
    numels = st.integers(1, 40_000)
    if equal_chunks:
        numels = st.just(draw(numels))
    are_committed = draw(st.booleans())
    chunks = []
    for chunk_id in range(num_chunks):
        is_trainable = draw(st.booleans() if not equal_chunks else st.just(True))
        chunks.append(
            ChunkDemand(
                chunk_id=chunk_id,
                numel=draw(numels),
                working_itemsize=working,
                master_itemsize=master if is_trainable else 0,
                is_trainable=is_trainable,
                is_pinned=chunk_id < num_pinned,
                is_committed=is_trainable and are_committed,
            )
        )
    return chunks


@st.composite
def shapes(draw: st.DrawFn, *, has_device: bool | None = None) -> RuntimeShape:
    return RuntimeShape(
        has_device=draw(st.booleans()) if has_device is None else has_device,
        tile_numel=draw(st.sampled_from([4096, 8192])),
        ring_depth=draw(st.integers(2, 4)),
        grad_itemsize=draw(st.sampled_from([2, 4])),
        has_spares=draw(st.booleans()),
    )


def grad_itemsize(demand: ChunkDemand, shape: RuntimeShape) -> int:
    """Bytes of a waiting gradient element: a chunk that is wider than the working dtype has its own width."""
    return max(shape.grad_itemsize, demand.working_itemsize)


def naive_demand(chunks: list[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape) -> dict[MemoryTier, int]:
    """Count tile by tile what docs/memory_model.md says, with no shortcut."""
    compute = DEVICE if shape.has_device else HOST
    total = dict.fromkeys(MemoryTier, 0)
    rings, fetches, device_grads, disk_grads = [0], [0], [0], [0]
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        for tile, tier in enumerate(homes.working):
            total[tier] += round_up(demand.working_tile_nbytes(tile, shape.tile_numel), 4096)
        for tile, tier in enumerate(homes.state):
            total[tier] += demand.state_tile_nbytes(tile, shape.tile_numel)
            rings.append(_ring_nbytes(demand, homes, tile, shape))
            if tile in homes.spares:
                total[tier] += demand.state_tile_nbytes(tile, shape.tile_numel)
                total[homes.working[tile]] += round_up(demand.working_tile_nbytes(tile, shape.tile_numel), 4096)
        if homes.grad is not None:
            total[homes.grad] += round_up(demand.numel * grad_itemsize(demand, shape), 4096)
        if homes.is_resident and any(tier is not compute for tier in homes.working):
            total[compute] += round_up(demand.working_nbytes, 4096)
        if shape.has_device and NVME in homes.working:
            fetches.append(round_up(demand.working_nbytes, 4096))
        if shape.has_device and homes.grad in (HOST, NVME):
            device_grads.append(round_up(demand.working_nbytes, 4096))
        if homes.grad is NVME:
            disk_grads.append(round_up(demand.numel * grad_itemsize(demand, shape), 4096))
    total[compute] += plan.num_slots * plan.slot_nbytes
    total[DEVICE] += 2 * max(device_grads)
    total[HOST] += 2 * max(device_grads) + 2 * max(disk_grads) + 2 * max(fetches) + shape.ring_depth * max(rings)
    return total


def _ring_nbytes(demand: ChunkDemand, homes: ChunkPlacement, tile: int, shape: RuntimeShape) -> int:
    nbytes = 0
    if homes.state[tile] is NVME:
        nbytes += demand.state_tile_nbytes(tile, shape.tile_numel)
    if homes.working[tile] is NVME:
        nbytes += round_up(demand.working_tile_nbytes(tile, shape.tile_numel), 4096)
    if homes.grad is NVME:
        nbytes += round_up(demand.tile_length(tile, shape.tile_numel) * grad_itemsize(demand, shape), 4096)
    return nbytes


@st.composite
def budgets_for(draw: st.DrawFn, shape: RuntimeShape) -> Budgets:
    nbytes = st.one_of(st.integers(1, 3_000_000), st.integers(1, 400_000))
    return Budgets(
        device=draw(nbytes) if shape.has_device else None,
        host=draw(nbytes),
        nvme=draw(st.none() | st.just(UNLIMITED) | nbytes),
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[ChunkDemand], RuntimeShape, Budgets, int]:
    chunks, shape = draw(models()), draw(shapes())
    return chunks, shape, draw(budgets_for(shape)), draw(st.integers(0, 3))


@st.composite
def fractions(draw: st.DrawFn, *, has_device: bool) -> StaticPlacement:
    def below(limit: float) -> float:
        return draw(st.sampled_from([0.0, limit]) | st.floats(0, limit))

    param_device = below(1.0) if has_device else 0.0
    state_device = below(param_device)
    return StaticPlacement(
        param_device=param_device,
        state_device=state_device,
        param_nvme=below(1.0 - param_device),
        state_nvme=below(1.0 - state_device),
        grad_nvme=below(1.0 - state_device),
    )


def add_nbytes(budgets: Budgets, tier: MemoryTier, nbytes: int) -> Budgets:
    return dataclasses.replace(budgets, **{tier.value: budgets.of(tier) + nbytes})


def parse_shortage(error: OutOfTierMemoryError) -> tuple[MemoryTier, int]:
    match = re.match(r"(\w+) tier is short by (\d+) bytes", str(error))
    assert match is not None, error
    return MemoryTier(match[1]), int(match[2])


def home_rank(homes: ChunkPlacement) -> int:
    return -max(list(MemoryTier).index(tier) for tier in homes.working)


@quickly
@given(problems())
def test_auto_plan_fits_every_budget_by_an_independent_count(problem):
    chunks, shape, budgets, prefetch_depth = problem
    try:
        plan = auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)
    except OutOfTierMemoryError:
        return
    counted = naive_demand(chunks, plan, shape)
    demand = memory_demand(chunks, plan, shape)
    for tier in MemoryTier:
        assert counted[tier] == demand.total(tier)
        assert counted[tier] <= budgets.of(tier)


@quickly
@given(problems())
def test_auto_plan_keeps_what_is_committed_off_the_device(problem):
    chunks, shape, budgets, prefetch_depth = problem
    try:
        plan = auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)
    except OutOfTierMemoryError:
        return
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        assert not (demand.is_committed and DEVICE in (*homes.working, *homes.state, homes.grad))


@quickly
@given(problems())
def test_raising_the_short_budgets_as_the_errors_say_makes_a_plan_possible(problem):
    chunks, shape, budgets, prefetch_depth = problem
    raised = set()
    for _ in range(len(MemoryTier)):
        try:
            auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)
            return
        except OutOfTierMemoryError as error:
            tier, shortage = parse_shortage(error)
            assert shortage > 0
            assert tier not in raised
            raised.add(tier)
            budgets = add_nbytes(budgets, tier, shortage)
    auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)


@quickly
@given(problems())
def test_one_byte_less_than_the_shortage_is_not_enough(problem):
    chunks, shape, budgets, prefetch_depth = problem
    try:
        auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)
    except OutOfTierMemoryError as error:
        tier, shortage = parse_shortage(error)
        with pytest.raises(OutOfTierMemoryError, match=f"{tier.value} tier is short by 1 bytes"):
            auto_placement(chunks, shape, add_nbytes(budgets, tier, shortage - 1), prefetch_depth=prefetch_depth)


@quickly
@given(problems(), st.integers(1, 1_000_000))
def test_more_host_memory_never_moves_weights_down(problem, more):
    chunks, shape, budgets, prefetch_depth = problem
    budgets = dataclasses.replace(budgets, nvme=UNLIMITED)
    try:
        before = auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)
    except OutOfTierMemoryError:
        return
    after = auto_placement(chunks, shape, add_nbytes(budgets, MemoryTier.HOST, more), prefetch_depth=prefetch_depth)
    for old, new in zip(before.chunks, after.chunks, strict=True):
        assert new.is_resident >= old.is_resident
        assert home_rank(new) >= home_rank(old)


@quickly
@given(models(), shapes(has_device=True), st.integers(1, 500_000), st.integers(1, 500_000), st.integers(0, 3))
def test_more_device_memory_never_makes_a_resident_leave(chunks, shape, device, more, prefetch_depth):
    budgets = Budgets(device=device, host=UNLIMITED, nvme=UNLIMITED)
    try:
        before = auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)
    except OutOfTierMemoryError:
        return
    after = auto_placement(chunks, shape, add_nbytes(budgets, MemoryTier.DEVICE, more), prefetch_depth=prefetch_depth)
    for old, new in zip(before.chunks, after.chunks, strict=True):
        assert new.is_resident >= old.is_resident


@quickly
@given(problems())
def test_auto_placement_is_deterministic(problem):
    chunks, shape, budgets, prefetch_depth = problem
    outcomes = []
    for _ in range(2):
        try:
            outcomes.append(repr(auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)))
        except OutOfTierMemoryError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@quickly
@given(st.data())
def test_static_fractions_are_met_to_within_a_tile_or_a_chunk(data):
    chunks, shape = data.draw(models()), data.draw(shapes())
    static = data.draw(fractions(has_device=shape.has_device))
    budgets = Budgets(device=UNLIMITED if shape.has_device else None, host=UNLIMITED, nvme=UNLIMITED)
    plan = static_placement(chunks, shape, static, budgets, prefetch_depth=2)

    working, state, grads = (dict.fromkeys(MemoryTier, 0) for _ in range(3))
    resident_nbytes = 0
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        for tile, tier in enumerate(homes.working):
            working[tier] += demand.working_tile_nbytes(tile, shape.tile_numel)
        for tile, tier in enumerate(homes.state):
            state[tier] += demand.state_tile_nbytes(tile, shape.tile_numel)
        if homes.grad is not None:
            grads[homes.grad] += round_up(demand.numel * grad_itemsize(demand, shape), 4096)
        resident_nbytes += demand.working_nbytes if homes.is_resident and not demand.is_pinned else 0

    def assert_met(found: int, fraction: float, total: int, step: int) -> None:
        assert fraction * total - step - 1 <= found <= fraction * total + 1

    trainable = [demand for demand in chunks if demand.is_trainable]
    tile = shape.tile_numel
    largest = max(demand.working_nbytes for demand in chunks)
    assert_met(working[NVME], static.param_nvme, sum(working.values()), tile * chunks[0].working_itemsize)
    assert_met(state[NVME], static.state_nvme, sum(state.values()), tile * 12 + 8192)
    if trainable:
        largest_grad = max(demand.numel * grad_itemsize(demand, shape) for demand in trainable) + 4096
        largest_state = max(
            sum(demand.state_tile_nbytes(t, tile) for t in range(demand.num_tiles(tile))) for demand in trainable
        )
        assert_met(grads[NVME], static.grad_nvme, sum(grads.values()), largest_grad)
        # The weights' own fraction may stop a chunk before the state's does.
        assert_met(state[DEVICE], static.state_device, sum(state.values()), 2 * largest_state)
    if shape.has_device and not any(demand.is_pinned for demand in chunks):
        assert_met(resident_nbytes, static.param_device, sum(working.values()), largest)


@quickly
@given(st.data())
def test_static_plan_counts_as_the_formula_says(data):
    chunks, shape = data.draw(models()), data.draw(shapes())
    static = data.draw(fractions(has_device=shape.has_device))
    budgets = Budgets(device=UNLIMITED if shape.has_device else None, host=UNLIMITED, nvme=UNLIMITED)
    plan = static_placement(chunks, shape, static, budgets, prefetch_depth=2)
    demand = memory_demand(chunks, plan, shape)
    assert {tier: demand.total(tier) for tier in MemoryTier} == naive_demand(chunks, plan, shape)


@quickly
@given(st.data())
def test_second_places_take_room_that_is_left_and_change_nothing_else(data):
    chunks, shape, budgets, prefetch_depth = data.draw(problems())
    shape = dataclasses.replace(shape, has_checksums=data.draw(st.booleans()))
    try:
        plan = auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth)
    except OutOfTierMemoryError:
        return
    found = add_spares(chunks, plan, shape, budgets, must_fit=False)
    check_plan(chunks, found, shape, budgets)
    assert dataclasses.replace(found, chunks=plan.chunks) == plan
    assert [dataclasses.replace(homes, spares=()) for homes in found.chunks] == list(plan.chunks)
    if not shape.has_spares:
        assert found == plan


@quickly
@given(models(), shapes(), st.data())
def test_with_room_enough_all_on_disk_and_half_of_the_rest_get_second_places(chunks, shape, data):
    shape = dataclasses.replace(shape, has_spares=True)
    static = data.draw(fractions(has_device=shape.has_device))
    budgets = Budgets(device=UNLIMITED if shape.has_device else None, host=UNLIMITED, nvme=UNLIMITED)
    plan = static_placement(chunks, shape, static, budgets, prefetch_depth=2)
    found = add_spares(chunks, plan, shape, budgets, must_fit=False)
    numels = {True: 0, False: 0}
    for demand, homes in zip(chunks, found.chunks, strict=True):
        for tile in range(len(homes.state)):
            if not can_have_spare(demand, homes, tile, shape):
                assert tile not in homes.spares
            elif homes.working[tile] is NVME:
                assert tile in homes.spares
            else:
                numels[tile in homes.spares] += demand.tile_length(tile, shape.tile_numel)
    # Each kind, by the state's tier, may be over its half by less than a tile.
    assert 0 <= numels[True] - numels[False] <= 4 * shape.tile_numel


@given(st.integers(0, 10**12), st.integers(1, 10**12), st.floats(0, 0.3))
def test_room_is_left_for_the_weights_of_states_that_stay_on_disk(free_nbytes, state_nbytes, share):
    working_nbytes = int(share * state_nbytes)
    taken = room_for_states(free_nbytes, state_nbytes, working_nbytes)
    assert 0 <= taken <= free_nbytes
    if state_nbytes > free_nbytes:
        left = (1 - taken / state_nbytes) * HOST_SPARE_SHARE * working_nbytes
        assert taken + left <= free_nbytes + 2 or taken == 0
    else:
        assert taken == free_nbytes
