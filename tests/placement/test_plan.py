"""The memory formula and the checks of a plan, against numbers computed by hand (docs/memory_model.md)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gemini.errors import ConfigError, OutOfTierMemoryError
from gemini.placement import (
    Budgets,
    ChunkDemand,
    ChunkPlacement,
    PlacementPlan,
    RuntimeShape,
    auto_placement,
    check_plan,
    memory_demand,
)
from gemini.tiers import MemoryTier

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
MEMORY_MODEL = Path(__file__).parents[2] / "docs" / "memory_model.md"

# The worked example of docs/memory_model.md: bfloat16, tiles of 4096, gradients accumulated in float32.
# Chunk 0, pinned: 4096 elements, one tile. Chunk 1: 10,000 elements, tiles of 4096, 4096 and 1808.
SHAPE = RuntimeShape(has_device=True, tile_numel=4096, ring_depth=2, grad_itemsize=4)
CHUNKS = [
    ChunkDemand(chunk_id=i, numel=numel, working_itemsize=2, master_itemsize=2, is_trainable=True, is_pinned=i == 0)
    for i, numel in enumerate([4096, 10_000])
]
PLAN = PlacementPlan(
    chunks=(
        ChunkPlacement(chunk_id=0, working=(HOST,), state=(HOST,), grad=HOST, is_resident=True),
        ChunkPlacement(chunk_id=1, working=(HOST, NVME, NVME), state=(HOST, NVME, NVME), grad=NVME, is_resident=False),
    ),
    num_slots=1,
    slot_nbytes=20_480,  # 20,000 rounded up
)
BUDGETS = Budgets(device=69_632, host=409_600, nvme=114_688)
BY_PURPOSE = {
    DEVICE: {
        "resident copies": 8_192,  # chunk 0: 4096 x 2
        "slots": 20_480,
        "gradient slots": 40_960,  # 2 x 20,480
    },
    HOST: {
        "working": 16_384,  # chunk 0 and tile 0 of chunk 1
        "state": 81_920,  # two records of 8,192 + 16,384 + 16,384
        "gradients": 16_384,  # chunk 0: 4096 x 4
        "update ring": 131_072,  # 2 x (record 40,960 + working 8,192 + gradient 16,384)
        "gradient slots": 122_880,  # 2 x (20,480 from the device + 40,960 for the disk)
        "fetch slots": 40_960,  # 2 x 20,480
    },
    NVME: {
        "working": 12_288,  # 8,192 + (3,616 -> 4,096)
        "state": 61_440,  # 40,960 + (3,616 -> 4,096) + 2 x (7,232 -> 8,192)
        "gradients": 40_960,  # 40,000 rounded up
    },
}


def test_worked_example_takes_the_bytes_computed_by_hand():
    assert memory_demand(CHUNKS, PLAN, SHAPE).by_purpose == BY_PURPOSE


def test_spares_take_what_their_tiles_take_again():
    first, second = PLAN.chunks
    with_spares = dataclasses.replace(second, spares=(0, 2))
    found = memory_demand(CHUNKS, dataclasses.replace(PLAN, chunks=(first, with_spares)), SHAPE).by_purpose
    assert found == {
        DEVICE: BY_PURPOSE[DEVICE],
        HOST: {**BY_PURPOSE[HOST], "spares": 8_192, "state spares": 40_960},  # of tile 0
        NVME: {**BY_PURPOSE[NVME], "spares": 4_096, "state spares": 20_480},  # of tile 2, which is shorter
    }


def test_a_tile_that_compute_uses_in_place_has_no_second_place():
    shape = dataclasses.replace(SHAPE, has_device=False)
    homes = ChunkPlacement(chunk_id=0, working=(HOST,), state=(NVME,), grad=HOST, is_resident=True, spares=(0,))
    plan = PlacementPlan(chunks=(homes,), num_slots=0, slot_nbytes=0)
    with pytest.raises(ConfigError, match="chunk 0: tile 0 cannot have a second place; leave it out of spares"):
        check_plan(CHUNKS[:1], plan, shape, Budgets(device=None, host=1 << 30, nvme=1 << 30))


def test_documentation_gives_the_numbers_of_the_worked_example():
    text = MEMORY_MODEL.read_text(encoding="ascii")
    for tier, purposes in BY_PURPOSE.items():
        for purpose, nbytes in purposes.items():
            assert f"| {tier.value} | {purpose} | {nbytes:,} |" in text
        assert f"| {tier.value} | **total** | **{sum(purposes.values()):,}** |" in text


def test_all_in_host_memory_takes_twelve_bytes_an_element_and_the_gradient():
    # 8192 elements in two tiles, on the CPU: 2 working + 10 state + 4 gradient bytes each, no buffers.
    chunk = dataclasses.replace(CHUNKS[0], numel=8192)
    plan = PlacementPlan(
        chunks=(ChunkPlacement(chunk_id=0, working=(HOST,) * 2, state=(HOST,) * 2, grad=HOST, is_resident=True),),
        num_slots=0,
        slot_nbytes=0,
    )
    shape = dataclasses.replace(SHAPE, has_device=False)
    assert memory_demand([chunk], plan, shape).by_purpose == {
        DEVICE: {},
        HOST: {"working": 16_384, "state": 81_920, "gradients": 32_768},
        NVME: {},
    }


def test_frozen_chunk_takes_its_weights_only():
    chunk = dataclasses.replace(CHUNKS[0], is_trainable=False, master_itemsize=0)
    plan = PlacementPlan(
        chunks=(ChunkPlacement(chunk_id=0, working=(NVME,), state=(), grad=None, is_resident=True),),
        num_slots=0,
        slot_nbytes=0,
    )
    assert memory_demand([chunk], plan, SHAPE).by_purpose == {
        DEVICE: {"resident copies": 8_192},
        HOST: {"fetch slots": 16_384},
        NVME: {"working": 8_192},
    }


def test_check_plan_returns_the_demand_of_a_plan_that_just_fits():
    demand = check_plan(CHUNKS, PLAN, SHAPE, BUDGETS)
    assert {tier: demand.total(tier) for tier in MemoryTier} == {DEVICE: 69_632, HOST: 409_600, NVME: 114_688}


@pytest.mark.parametrize("tier", list(MemoryTier))
def test_check_plan_says_which_tier_is_one_byte_short(tier):
    budgets = dataclasses.replace(BUDGETS, **{tier.value: BUDGETS.of(tier) - 1})
    with pytest.raises(OutOfTierMemoryError, match=rf"^{tier.value} tier is short by 1 bytes"):
        check_plan(CHUNKS, PLAN, SHAPE, budgets)


def test_shortage_names_what_takes_the_bytes_and_what_would_fix_it():
    shape = dataclasses.replace(SHAPE, ring_depth=4)
    with pytest.raises(OutOfTierMemoryError) as raised:
        check_plan(CHUNKS, PLAN, shape, BUDGETS)
    assert str(raised.value) == (
        "host tier is short by 131072 bytes (128.00 KiB): the plan takes 528.00 KiB there (update ring 256.00 KiB, "
        "gradient slots 120.00 KiB, state 80.00 KiB, fetch slots 40.00 KiB, gradients 16.00 KiB, working 16.00 KiB) "
        "and the budget is 400.00 KiB; raise host_budget to at least 540672 bytes; or set gradient_accumulation=False "
        "(saves 80.00 KiB); or lower ring_depth to 2 (saves 128.00 KiB); or lower tile_numel (the update ring shrinks "
        "with it)"
    )


def change(index: int, **fields: object) -> PlacementPlan:
    homes = list(PLAN.chunks)
    homes[index] = dataclasses.replace(homes[index], **fields)
    return dataclasses.replace(PLAN, chunks=tuple(homes))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dataclasses.replace(PLAN, chunks=PLAN.chunks[:1]), "expected 2 chunks, got 1"),
        (change(1, chunk_id=5), "chunk 1: found chunk_id 5"),
        (change(1, working=(HOST,)), "chunk 1: expected 3 working tiles, got 1"),
        (change(1, state=(HOST,) * 4), "chunk 1: expected 3 state tiles, got 4"),
        (change(0, grad=None), "chunk 0: expected a gradient home"),
        (change(1, working=(DEVICE, HOST, HOST)), "chunk 1: the working tiles must all live on the device or none"),
        (change(0, working=(DEVICE,)), "chunk 0: working weights live on the device exactly when the state does"),
        (change(0, state=(DEVICE,)), "chunk 0: working weights live on the device exactly when the state does"),
        (change(0, grad=DEVICE), "chunk 0: the gradient lives on the device exactly when the state does"),
        (change(0, is_resident=False), "chunk 0: its working weights must always be in compute memory"),
        (dataclasses.replace(PLAN, num_slots=0), "num_slots: expected at least 1, got 0"),
        (dataclasses.replace(PLAN, slot_nbytes=16_384), "slot_nbytes: expected a multiple of 4096 of at least 20480"),
        (dataclasses.replace(PLAN, slot_nbytes=20_481), "slot_nbytes: expected a multiple of 4096 of at least 20480"),
        (change(1, is_resident=True), "num_slots and slot_nbytes must be 0"),
    ],
)
def test_check_plan_refuses_a_malformed_plan(plan, message):
    with pytest.raises(ConfigError, match=message):
        check_plan(CHUNKS, plan, SHAPE, BUDGETS)


def test_check_plan_refuses_tiers_that_do_not_exist():
    with pytest.raises(ConfigError, match="a home is NVME but there is no disk tier"):
        check_plan(CHUNKS, PLAN, SHAPE, dataclasses.replace(BUDGETS, nvme=None))
    on_device = change(0, working=(DEVICE,), state=(DEVICE,), grad=DEVICE)
    cpu, cpu_budgets = dataclasses.replace(SHAPE, has_device=False), dataclasses.replace(BUDGETS, device=None)
    with pytest.raises(ConfigError, match="a home is DEVICE but there is no device tier"):
        check_plan(CHUNKS, on_device, cpu, cpu_budgets)
    with pytest.raises(ConfigError, match=r"Budgets\.device"):
        check_plan(CHUNKS, PLAN, SHAPE, cpu_budgets)


def test_check_plan_wants_a_slot_for_each_chunk_needed_at_once():
    three = [dataclasses.replace(CHUNKS[1], chunk_id=i) for i in range(3)]
    homes = tuple(dataclasses.replace(PLAN.chunks[1], chunk_id=i) for i in range(3))
    plan = PlacementPlan(chunks=homes, num_slots=2, slot_nbytes=20_480)
    unlimited = Budgets(device=1 << 30, host=1 << 30, nvme=1 << 30)
    check_plan(three, plan, SHAPE, unlimited)
    with pytest.raises(ConfigError, match="num_slots: expected at least 3, got 2"):
        check_plan(three, plan, SHAPE, unlimited, chunks_at_once=3)


def test_check_plan_wants_weights_wholly_in_host_memory_to_be_resident_on_the_cpu():
    cpu, budgets = dataclasses.replace(SHAPE, has_device=False), dataclasses.replace(BUDGETS, device=None)
    with pytest.raises(ConfigError, match="chunk 1: all its working weights live in compute memory"):
        check_plan(CHUNKS, change(1, working=(HOST,) * 3), cpu, budgets)


# A frozen chunk of 4 ranks, two of them on this machine: shards of 6144 elements, tiles of 4096 and 2048, in bfloat16.
FROZEN = ChunkDemand(
    chunk_id=0,
    numel=6144,
    working_itemsize=2,
    master_itemsize=0,
    is_trainable=False,
    is_pinned=False,
    is_sharded=True,
    num_ranks=4,
    num_sharers=2,
)
ON_CPU = dataclasses.replace(SHAPE, has_device=False)


def frozen_plan(*working: MemoryTier, is_resident: bool) -> PlacementPlan:
    homes = ChunkPlacement(chunk_id=0, working=working, state=(), grad=None, is_resident=is_resident)
    num_slots = 0 if is_resident else 1
    return PlacementPlan(chunks=(homes,), num_slots=num_slots, slot_nbytes=num_slots * 49_152)


@pytest.mark.parametrize(
    ("shape", "plan", "expected"),
    [
        (ON_CPU, frozen_plan(HOST, HOST, is_resident=True), {HOST: {"shared weights": 24_576}}),
        (
            SHAPE,
            frozen_plan(HOST, HOST, is_resident=False),
            {HOST: {"shared weights": 24_576}, DEVICE: {"slots": 49_152}},
        ),
        (
            SHAPE,
            frozen_plan(HOST, HOST, is_resident=True),
            {HOST: {"shared weights": 24_576}, DEVICE: {"resident copies": 49_152}},
        ),
        (
            ON_CPU,
            frozen_plan(HOST, NVME, is_resident=False),
            {HOST: {"working": 8_192, "slots": 49_152}, NVME: {"working": 4_096}},
        ),
    ],
)
def test_frozen_weights_in_host_memory_count_by_share(shape, plan, expected):
    by_purpose = memory_demand([FROZEN], plan, shape).by_purpose
    assert {tier: purposes for tier, purposes in by_purpose.items() if purposes} == expected


@pytest.mark.parametrize(
    ("working", "is_resident", "message"),
    [
        ((HOST, HOST), False, "all its working weights live in compute memory, so is_resident must be True"),
        ((HOST, NVME), True, "with several ranks is_resident must be False for this chunk"),
    ],
)
def test_frozen_weights_that_ranks_share_are_used_in_place(working, is_resident, message):
    budgets = Budgets(device=None, host=1 << 20, nvme=1 << 20)
    with pytest.raises(ConfigError, match=message):
        check_plan([FROZEN], frozen_plan(*working, is_resident=is_resident), ON_CPU, budgets)


def test_automatic_placement_shares_what_fits_host_memory():
    large, small = (
        auto_placement([FROZEN], ON_CPU, Budgets(device=None, host=host, nvme=1 << 20), prefetch_depth=0)
        for host in (24_576, 24_575 + 49_152)
    )
    assert large == frozen_plan(HOST, HOST, is_resident=True)
    assert small == large
    trained = dataclasses.replace(FROZEN, is_trainable=True, num_sharers=1)
    cut = auto_placement([trained], ON_CPU, Budgets(device=None, host=1 << 20, nvme=None), prefetch_depth=0)
    assert not cut.chunks[0].is_resident


def test_a_short_host_budget_names_sharing_where_it_costs_bytes():
    plan = frozen_plan(HOST, HOST, is_resident=True)
    with pytest.raises(OutOfTierMemoryError, match="set share_frozen=False, which cuts frozen weights"):
        check_plan([FROZEN], plan, ON_CPU, Budgets(device=None, host=4096, nvme=None))
