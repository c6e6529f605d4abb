"""Where buffers for chunks come from: a fixed set, or as many as the budget lasts for."""

from __future__ import annotations

import pytest

from gemini.errors import OutOfTierMemoryError
from gemini.offload.arena import HostArena
from gemini.offload.slots import FixedSlots, GrowingSlots
from gemini.offload.transfer import CpuTransfers
from gemini.tiers import MemoryTier, TierLedger

HOST = MemoryTier.HOST


def transfers_of(budget_nbytes: int) -> tuple[CpuTransfers, TierLedger]:
    ledger = TierLedger({HOST: budget_nbytes})
    return CpuTransfers(HostArena(ledger)), ledger


def test_fixed_slots_are_all_allocated_at_once() -> None:
    transfers, ledger = transfers_of(12_288)
    slots = FixedSlots(transfers, num_slots=3, slot_nbytes=4000, purpose="slots")
    assert ledger.by_purpose(HOST) == {"slots": 12_288}
    assert slots.num_free() == 3
    slots.close()
    assert ledger.by_purpose(HOST) == {}
    assert slots.num_free() == 0


def test_fixed_slots_run_out_and_come_back() -> None:
    transfers, _ = transfers_of(1 << 20)
    slots = FixedSlots(transfers, num_slots=2, slot_nbytes=8192, purpose="slots")
    first, second = slots.acquire(8192), slots.acquire(1)
    assert first is not None
    assert second is not None
    assert first.data_ptr() != second.data_ptr()
    assert slots.acquire(1) is None
    slots.give_back(first)
    again = slots.acquire(8192)
    assert again is not None
    assert again.data_ptr() == first.data_ptr()


def test_a_chunk_larger_than_a_slot_is_our_own_mistake() -> None:
    transfers, _ = transfers_of(1 << 20)
    slots = FixedSlots(transfers, num_slots=1, slot_nbytes=4096, purpose="slots")
    with pytest.raises(AssertionError, match="a chunk of 4097 bytes does not fit a slot of 4096"):
        slots.acquire(4097)


def test_fixed_slots_beyond_the_budget_are_refused() -> None:
    transfers, _ = transfers_of(8192)
    with pytest.raises(OutOfTierMemoryError, match=r"^host tier: 4.00 KiB more for slots exceed the budget"):
        FixedSlots(transfers, num_slots=3, slot_nbytes=4096, purpose="slots")


def test_no_slots_take_no_memory() -> None:
    transfers, ledger = transfers_of(1)
    slots = FixedSlots(transfers, num_slots=0, slot_nbytes=0, purpose="slots")
    assert ledger.held_nbytes(HOST) == 0
    assert slots.acquire(0) is None


def test_growing_slots_last_as_long_as_the_budget() -> None:
    transfers, ledger = transfers_of(12_288)
    slots = GrowingSlots(transfers, purpose="slots")
    large = slots.acquire(8192)
    assert large is not None
    assert slots.acquire(4096) is not None
    assert slots.acquire(1) is None
    slots.give_back(large)
    assert ledger.by_purpose(HOST) == {"slots": 4096}
    assert slots.num_free() == 0
