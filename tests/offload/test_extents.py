"""Extents never overlap, are exactly as large as promised and melt together again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.errors import OutOfTierMemoryError
from gemini.offload.extents import Extent, ExtentAllocator

BLOCK = 4096


def test_allocation_is_rounded_up_to_blocks() -> None:
    allocator = ExtentAllocator(10 * BLOCK)
    assert allocator.allocate(1) == Extent(0, BLOCK)
    assert allocator.allocate(BLOCK + 1) == Extent(BLOCK, 2 * BLOCK)
    assert allocator.held_nbytes == 3 * BLOCK


def test_capacity_is_rounded_down_to_blocks() -> None:
    allocator = ExtentAllocator(2 * BLOCK - 1)
    assert allocator.capacity_nbytes == BLOCK
    assert allocator.free_extents == (Extent(0, BLOCK),)


def test_best_fit_takes_the_tightest_hole() -> None:
    allocator = ExtentAllocator(10 * BLOCK)
    taken = [allocator.allocate(n * BLOCK) for n in (3, 1, 2, 1, 3)]
    for extent in (taken[0], taken[2], taken[4]):
        allocator.free(extent)
    assert allocator.allocate(2 * BLOCK) == taken[2]


def test_equal_holes_are_taken_lowest_address_first() -> None:
    allocator = ExtentAllocator(5 * BLOCK)
    taken = [allocator.allocate(BLOCK) for _ in range(5)]
    for extent in (taken[3], taken[1]):
        allocator.free(extent)
    assert allocator.allocate(BLOCK) == taken[1]


def test_shortage_names_the_numbers() -> None:
    allocator = ExtentAllocator(4 * BLOCK)
    middle = [allocator.allocate(BLOCK) for _ in range(4)]
    allocator.free(middle[0])
    allocator.free(middle[2])
    expected = (
        r"16\.00 KiB are held|8\.00 KiB of 16\.00 KiB are held and the longest free run is 4\.00 KiB \(4096 bytes\)"
    )
    with pytest.raises(OutOfTierMemoryError, match=expected):
        allocator.allocate(2 * BLOCK)
    assert allocator.held_nbytes == 2 * BLOCK


def test_empty_capacity_refuses_everything() -> None:
    with pytest.raises(OutOfTierMemoryError, match=r"longest free run is 0 B"):
        ExtentAllocator(0).allocate(1)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_extent_without_bytes_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="more than 0 bytes"):
        ExtentAllocator(BLOCK).allocate(nbytes)


def test_negative_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity >= 0"):
        ExtentAllocator(-1)


def test_freeing_twice_is_refused() -> None:
    allocator = ExtentAllocator(4 * BLOCK)
    extent = allocator.allocate(BLOCK)
    allocator.free(extent)
    with pytest.raises(ValueError, match="not allocated"):
        allocator.free(extent)


def test_freeing_part_of_an_extent_is_refused() -> None:
    allocator = ExtentAllocator(4 * BLOCK)
    allocator.allocate(2 * BLOCK)
    with pytest.raises(ValueError, match="not allocated"):
        allocator.free(Extent(0, BLOCK))


def test_growth_extends_the_last_hole() -> None:
    allocator = ExtentAllocator(2 * BLOCK)
    allocator.allocate(BLOCK)
    allocator.grow(5 * BLOCK + 1)
    assert allocator.free_extents == (Extent(BLOCK, 4 * BLOCK),)


def test_shrinking_is_refused() -> None:
    with pytest.raises(ValueError, match="at least the present"):
        ExtentAllocator(2 * BLOCK).grow(BLOCK)


def _check(allocator: ExtentAllocator, taken: list[Extent]) -> None:
    """Taken and free extents tile the range exactly, and no two free ones touch."""
    pieces = sorted([*taken, *allocator.free_extents], key=lambda extent: extent.offset)
    position = 0
    for piece in pieces:
        assert piece.offset == position
        assert piece.nbytes > 0
        assert piece.nbytes % BLOCK == 0
        position = piece.end
    assert position == allocator.capacity_nbytes
    free = allocator.free_extents
    assert all(first.end < second.offset for first, second in itertools.pairwise(free))
    assert allocator.held_nbytes == sum(extent.nbytes for extent in taken)


@settings(max_examples=200)
@given(
    capacity=st.integers(0, 60 * BLOCK),
    steps=st.lists(st.tuples(st.sampled_from(["take", "take", "free", "grow"]), st.integers(1, 20 * BLOCK))),
)
def test_any_history_keeps_extents_disjoint_and_exact(capacity: int, steps: list[tuple[str, int]]) -> None:
    allocator = ExtentAllocator(capacity)
    taken: list[Extent] = []
    for action, number in steps:
        if action == "grow":
            allocator.grow(allocator.capacity_nbytes + number)
        elif action == "free" and taken:
            allocator.free(taken.pop(number % len(taken)))
        elif action == "take":
            fits = any(extent.nbytes >= number for extent in allocator.free_extents)
            try:
                extent = allocator.allocate(number)
            except OutOfTierMemoryError:
                assert not fits
            else:
                assert fits
                assert extent.nbytes == -(-number // BLOCK) * BLOCK
                taken.append(extent)
        _check(allocator, taken)
    for extent in taken:
        allocator.free(extent)
    whole = (Extent(0, allocator.capacity_nbytes),) if allocator.capacity_nbytes else ()
    assert allocator.free_extents == whole
