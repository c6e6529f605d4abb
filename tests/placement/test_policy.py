"""Automatic and static placement on small models whose best plan can be seen at a glance."""

from __future__ import annotations

import time

import pytest

from gemini.errors import ConfigError, OutOfTierMemoryError
from gemini.placement import (
    Budgets,
    ChunkDemand,
    ChunkPlacement,
    PlacementPlan,
    RuntimeShape,
    StaticPlacement,
    auto_placement,
    choose_plan,
    memory_demand,
    static_placement,
)
from gemini.tiers import MemoryTier

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
CPU = RuntimeShape(has_device=False, tile_numel=4096, ring_depth=2, grad_itemsize=4)
GPU = RuntimeShape(has_device=True, tile_numel=4096, ring_depth=2, grad_itemsize=4)
KIB = 1024
# A chunk of one tile takes 8 KiB of working weights, 40 KiB of state and 16 KiB of gradient: 64 KiB.


def chunk(chunk_id: int, numel: int = 4096, *, is_trainable: bool = True, is_pinned: bool = False) -> ChunkDemand:
    return ChunkDemand(
        chunk_id=chunk_id,
        numel=numel,
        working_itemsize=2,
        master_itemsize=2 if is_trainable else 0,
        is_trainable=is_trainable,
        is_pinned=is_pinned,
    )


def auto(chunks: list[ChunkDemand], shape: RuntimeShape, **nbytes: int | None) -> PlacementPlan:
    budgets = Budgets(**{"device": None, "host": 1 << 40, "nvme": None} | nbytes)
    return auto_placement(chunks, shape, budgets, prefetch_depth=2)


def initials(plan: PlacementPlan) -> list[str]:
    """Write the homes as working/state/grad, * for resident."""

    def letters(tiers: tuple[MemoryTier, ...]) -> str:
        return "".join(tier.name[0] for tier in tiers)

    def word(homes: ChunkPlacement) -> str:
        grad = homes.grad.name[0] if homes.grad else ""
        return f"{letters(homes.working)}/{letters(homes.state)}/{grad}" + "*" * homes.is_resident

    return [word(homes) for homes in plan.chunks]


def test_cpu_keeps_everything_in_host_memory_without_slots_when_it_fits():
    plan = auto([chunk(0), chunk(1)], CPU, host=128 * KIB, nvme=1 << 40)
    assert initials(plan) == ["H/H/H*", "H/H/H*"]
    assert (plan.num_slots, plan.slot_nbytes) == (0, 0)


def test_cpu_keeps_a_gradient_in_host_memory_whose_slots_to_disk_would_be_larger():
    embedding, blocks = chunk(0, 8 * 4096), [chunk(i) for i in range(1, 9)]
    # On disk, the embedding's gradient of 128 KiB would need two slots of 128 KiB; a block's needs two of 16 KiB.
    plan = auto([embedding, *blocks], CPU, host=400 * KIB, nvme=1 << 40)
    assert plan.chunks[0].grad is HOST
    assert memory_demand([embedding, *blocks], plan, CPU).by_purpose[HOST]["gradient slots"] == 2 * 16 * KIB


def test_cpu_without_disk_says_what_would_fix_it():
    with pytest.raises(
        OutOfTierMemoryError, match=r"short by 1 bytes .*raise host_budget to at least 131072 bytes; or ad"
    ):
        auto([chunk(0), chunk(1)], CPU, host=128 * KIB - 1)


def test_cpu_promotes_weights_then_gradients_then_tiles_of_state():
    # 12 chunks with all else on disk: 4 slots x 8 + ring 2 x 64 + gradient slots 2 x 16 = 192 KiB.
    chunks = [chunk(i) for i in range(12)]

    def homes(kib: int) -> list[str]:
        return initials(auto(chunks, CPU, host=kib * KIB, nvme=1 << 40))

    assert homes(192) == ["N/N/N"] * 12
    # One chunk less on disk, one more resident of 8 KiB.
    assert homes(200) == ["N/N/N"] * 11 + ["H/N/N*"]
    # All 12 resident free slots and the working tiles of the ring: 96 + 2 x 56 + 32 = 240; 8 KiB are left over.
    assert homes(248) == ["H/N/N*"] * 12
    # Two gradients: 240 + 32.
    assert homes(272) == ["H/N/N*"] * 10 + ["H/N/H*"] * 2
    # All gradients free their slots and the ring's share: 96 + 192 + 2 x 40 = 368; one state: 40.
    assert homes(408) == ["H/N/H*"] * 11 + ["H/H/H*"]


def test_first_tiles_of_a_chunk_get_the_room_that_is_left_for_state():
    # Three tiles each: working 24, gradients 48, ring 2 x 40 -> 2 x 72 + 80 = 224 KiB, and one tile of state: 40.
    plan = auto([chunk(0, 3 * 4096), chunk(1, 3 * 4096)], CPU, host=(224 + 79) * KIB, nvme=1 << 40)
    assert initials(plan) == ["HHH/NNN/H*", "HHH/HNN/H*"]


def test_device_takes_everything_when_it_fits():
    plan = auto([chunk(0), chunk(1)], GPU, device=128 * KIB, host=1)
    assert initials(plan) == ["D/D/D*", "D/D/D*"]


def test_device_promotes_residents_from_the_last_chunk_then_their_states():
    # Six chunks in 4 slots of 8 KiB with 2 gradient slots of 8 KiB: 48 KiB.
    chunks = [chunk(i) for i in range(6)]

    def homes(kib: int) -> list[str]:
        return initials(auto(chunks, GPU, device=kib * KIB))

    assert homes(48) == ["H/H/H"] * 6
    assert homes(56) == ["H/H/H"] * 5 + ["H/H/H*"]
    # All resident: 48 + 16 = 64; a state with its gradient: 56 more.
    assert homes(64) == ["H/H/H*"] * 6
    assert homes(120) == ["H/H/H*"] * 5 + ["D/D/D*"]


def test_device_takes_fewer_slots_rather_than_fail():
    chunks = [chunk(i) for i in range(6)]
    assert auto(chunks, GPU, device=48 * KIB).num_slots == 4
    assert auto(chunks, GPU, device=40 * KIB).num_slots == 3
    assert auto(chunks, GPU, device=32 * KIB).num_slots == 2
    with pytest.raises(OutOfTierMemoryError, match="device tier is short by 8192 bytes"):
        auto(chunks, GPU, device=24 * KIB)


def test_unit_of_several_chunks_needs_as_many_slots():
    chunks = [chunk(i) for i in range(8)]
    budgets = Budgets(device=72 * KIB, host=1 << 40, nvme=None)
    plan = auto_placement(chunks, GPU, budgets, prefetch_depth=0, chunks_at_once=5)
    assert plan.num_slots == 5
    with pytest.raises(OutOfTierMemoryError, match="device tier"):
        auto_placement(
            chunks, GPU, Budgets(device=48 * KIB, host=1 << 40, nvme=None), prefetch_depth=0, chunks_at_once=5
        )


def test_one_huge_chunk_is_resident_rather_than_the_measure_of_all_slots():
    # As a resident: 80 + 4 x 8 KiB. In a slot: 4 x 80 KiB. Gradient slots: 2 x 80 KiB.
    chunks = [chunk(0, 40_960), *(chunk(i) for i in range(1, 7))]
    plan = auto(chunks, GPU, device=(80 + 32 + 160) * KIB)
    assert [homes.is_resident for homes in plan.chunks] == [True] + [False] * 6
    assert (plan.num_slots, plan.slot_nbytes) == (4, 8 * KIB)


def test_pinned_chunk_is_resident_in_the_smallest_plan():
    chunks = [chunk(0, is_pinned=True), *(chunk(i) for i in range(1, 7))]
    assert initials(auto(chunks, GPU, device=56 * KIB)) == ["H/H/H*"] + ["H/H/H"] * 6
    chunks = [chunk(0, is_pinned=True), *(chunk(i) for i in range(1, 12))]
    on_disk = auto(chunks, CPU, host=200 * KIB, nvme=1 << 40)
    assert initials(on_disk) == ["H/N/N*"] + ["N/N/N"] * 11


def test_frozen_resident_lives_on_the_device_and_takes_no_host_memory():
    # Five frozen chunks and one that is trained: in 4 slots and 2 gradient slots 48 KiB, all resident 64 KiB.
    chunks = [*(chunk(i, is_trainable=False) for i in range(5)), chunk(5)]
    plan = auto(chunks, GPU, device=64 * KIB)
    assert initials(plan) == ["D//*"] * 5 + ["H/H/H*"]
    assert memory_demand(chunks, plan, GPU).by_purpose[HOST] == {
        "working": 8 * KIB,
        "state": 40 * KIB,
        "gradients": 16 * KIB,
        "gradient slots": 16 * KIB,
    }


def test_device_takes_states_instead_of_copies_when_the_host_is_short():
    # With copies only, host memory holds six chunks of 64 KiB and 16 KiB of gradient slots.
    chunks = [chunk(i) for i in range(6)]
    plan = auto(chunks, GPU, device=112 * KIB, host=(5 * 64 + 16) * KIB)
    assert initials(plan) == ["H/H/H"] * 5 + ["D/D/D*"]


def test_device_tier_leaves_weights_of_residents_on_disk_before_those_of_others():
    # Fetch slots 16 + gradient slots 16 + 32 + ring 2 x 64 = 192 KiB; then 8 KiB a chunk.
    chunks = [chunk(i) for i in range(6)]
    plan = auto(chunks, GPU, device=56 * KIB, host=(192 + 8) * KIB, nvme=1 << 40)
    assert initials(plan) == ["N/N/N"] * 4 + ["H/N/N"] + ["N/N/N*"]


def test_short_disk_says_so_after_host_memory_is_full():
    chunks = [chunk(i) for i in range(12)]
    with pytest.raises(OutOfTierMemoryError, match=r"nvme tier is short by .*raise NVMeConfig\.budget to at least"):
        auto(chunks, CPU, host=200 * KIB, nvme=100 * KIB)


def test_two_thousand_chunks_of_fifty_tiles_take_seconds_at_most():
    chunks = [chunk(i, 50 << 20) for i in range(2000)]
    shape = RuntimeShape(has_device=True, tile_numel=1 << 20, ring_depth=4, grad_itemsize=4)
    started = time.process_time()
    auto(chunks, shape, device=24 << 30, host=500 << 30, nvme=3000 << 30)
    assert time.process_time() - started < 8


def test_static_fractions_choose_whole_chunks_for_the_device_and_tiles_for_the_disk():
    chunks = [chunk(i, 2 * 4096) for i in range(4)]
    static = StaticPlacement(param_device=0.5, state_device=0.25, param_nvme=0.375, state_nvme=0.5, grad_nvme=0.25)
    budgets = Budgets(device=1 << 30, host=1 << 30, nvme=1 << 30)
    plan = static_placement(chunks, GPU, static, budgets, prefetch_depth=2)
    assert initials(plan) == ["NN/NN/N", "HN/NN/H", "HH/HH/H*", "DD/DD/D*"]
    assert (plan.num_slots, plan.slot_nbytes) == (2, 16 * KIB)


def test_static_on_the_cpu_reads_in_place_what_is_wholly_in_host_memory():
    chunks = [chunk(i, 2 * 4096, is_pinned=i == 0) for i in range(3)]
    budgets = Budgets(device=None, host=1 << 30, nvme=1 << 30)
    plan = static_placement(chunks, CPU, StaticPlacement(param_nvme=0.5), budgets, prefetch_depth=2)
    assert initials(plan) == ["HH/HH/H*", "NN/HH/H", "HN/HH/H"]
    everything = static_placement(chunks, CPU, StaticPlacement(param_nvme=1.0), budgets, prefetch_depth=2)
    assert initials(everything) == ["NN/HH/H*", "NN/HH/H", "NN/HH/H"]


def test_static_refuses_tiers_that_do_not_exist():
    with pytest.raises(ConfigError, match="StaticPlacement.param_device: expected 0"):
        static_placement(
            [chunk(0)],
            CPU,
            StaticPlacement(param_device=0.5),
            Budgets(device=None, host=1 << 30, nvme=None),
            prefetch_depth=2,
        )
    with pytest.raises(ConfigError, match="StaticPlacement.state_nvme: expected 0"):
        static_placement(
            [chunk(0)],
            CPU,
            StaticPlacement(state_nvme=0.5),
            Budgets(device=None, host=1 << 30, nvme=None),
            prefetch_depth=2,
        )


def test_static_refuses_more_gradients_below_than_states():
    with pytest.raises(ConfigError, match="state_device \\+ grad_nvme must not exceed 1"):
        StaticPlacement(param_device=0.8, state_device=0.8, grad_nvme=0.5)


def test_static_raises_when_a_budget_is_too_small():
    with pytest.raises(OutOfTierMemoryError, match="host tier is short by 1 bytes"):
        static_placement(
            [chunk(0)],
            CPU,
            StaticPlacement(),
            Budgets(device=None, host=64 * KIB - 1, nvme=None),
            prefetch_depth=2,
        )


def test_choose_plan_takes_all_three_ways_to_say_it():
    chunks, budgets = [chunk(0), chunk(1)], Budgets(device=None, host=128 * KIB, nvme=None)
    by_auto = choose_plan("auto", chunks, CPU, budgets, prefetch_depth=2)
    by_fractions = choose_plan(StaticPlacement(), chunks, CPU, budgets, prefetch_depth=2)
    by_hand = choose_plan(by_auto, chunks, CPU, budgets, prefetch_depth=2)
    assert by_auto == by_fractions == by_hand
