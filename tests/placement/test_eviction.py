"""Belady's choice, and prefetching that never undoes it."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.placement.eviction import farthest_next_use
from gemini.placement.prefetch import PrefetchDecision, choose_prefetch

quickly = settings(max_examples=100)


def next_uses(uses: list[int], start: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for position in range(start, len(uses)):
        found.setdefault(uses[position], position)
    return found


def count_fetches_by_farthest_use(uses: list[int], num_slots: int) -> int:
    held: set[int] = set()
    num_fetches = 0
    for position, chunk_id in enumerate(uses):
        if chunk_id not in held:
            num_fetches += 1
            if len(held) == num_slots:
                held.remove(farthest_next_use(held, next_uses(uses, position)))
            held.add(chunk_id)
    return num_fetches


def count_fetches_by_least_recent_use(uses: list[int], num_slots: int) -> int:
    held: dict[int, None] = {}  # least recently used first
    num_fetches = 0
    for chunk_id in uses:
        if chunk_id in held:
            del held[chunk_id]
        else:
            num_fetches += 1
            if len(held) == num_slots:
                del held[next(iter(held))]
        held[chunk_id] = None
    return num_fetches


def count_fewest_fetches(uses: list[int], num_slots: int) -> int:
    @cache
    def fewest(position: int, held: frozenset[int]) -> int:
        if position == len(uses):
            return 0
        chunk_id = uses[position]
        if chunk_id in held:
            return fewest(position + 1, held)
        if len(held) < num_slots:
            return 1 + fewest(position + 1, held | {chunk_id})
        return 1 + min(fewest(position + 1, held - {victim} | {chunk_id}) for victim in held)

    return fewest(0, frozenset())


def count_fetches_with_prefetch(uses: list[int], num_slots: int, depth: int) -> int:
    """Fetch on demand by farthest next use, and prefetch after each access all that is wise."""
    held: set[int] = set()
    num_fetches = 0
    for position, chunk_id in enumerate(uses):
        if chunk_id not in held:
            num_fetches += 1
            if len(held) == num_slots:
                held.remove(farthest_next_use(held, next_uses(uses, position)))
            held.add(chunk_id)
        decisions = choose_prefetch(
            uses[position + 1 :],
            held,
            num_free_slots=num_slots - len(held),
            evictable=held - {chunk_id},
            depth=depth,
        )
        for decision in decisions:
            num_fetches += 1
            if decision.evict_chunk is not None:
                held.remove(decision.evict_chunk)
            held.add(decision.fetch_chunk)
        assert len(held) <= num_slots
        assert chunk_id in held
    return num_fetches


traces = st.lists(st.integers(0, 5), max_size=14)


def test_the_chunk_that_is_used_last_leaves():
    assert farthest_next_use([3, 5, 7], {3: 10, 5: 30, 7: 20}) == 5


def test_a_chunk_that_is_never_used_again_leaves_first():
    assert farthest_next_use([3, 5, 7], {3: 10, 5: 30}) == 7


def test_among_equals_the_smallest_id_leaves():
    assert farthest_next_use([9, 4, 6], {}) == 4


def test_nothing_to_evict_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        farthest_next_use([], {1: 2})


@quickly
@given(traces, st.integers(1, 4))
def test_farthest_next_use_fetches_as_few_as_any_order_of_evictions(uses, num_slots):
    assert count_fetches_by_farthest_use(uses, num_slots) == count_fewest_fetches(uses, num_slots)


@quickly
@given(st.lists(st.integers(0, 12), max_size=80), st.integers(1, 6))
def test_farthest_next_use_never_fetches_more_than_least_recent_use(uses, num_slots):
    assert count_fetches_by_farthest_use(uses, num_slots) <= count_fetches_by_least_recent_use(uses, num_slots)


def test_forward_and_backward_over_six_chunks_in_three_slots():
    # Forward 0..5, backward 5..0: 3, 4 and 5 stay over the turn; least recent use keeps them, too.
    step = [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    assert count_fetches_by_farthest_use(step, 3) == 9
    # In a cycle least recent use never hits.
    assert count_fetches_by_farthest_use([0, 1, 2, 3] * 3, 3) == 6
    assert count_fetches_by_least_recent_use([0, 1, 2, 3] * 3, 3) == 12


@pytest.mark.parametrize("num_slots", [3, 4, 5, 8])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_prefetch_over_forward_and_backward_costs_no_fetch_more(num_slots, depth):
    steps = [*range(8), *reversed(range(8))] * 3
    fewest = count_fetches_by_farthest_use(steps, num_slots)
    assert count_fetches_with_prefetch(steps, num_slots, depth) == fewest


@quickly
@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.sets(st.integers(0, 9)),
    st.sets(st.integers(0, 9)),
    st.integers(0, 3),
    st.integers(0, 8),
)
def test_prefetch_never_evicts_what_is_used_before_what_it_fetches(upcoming, held, in_use, num_free_slots, depth):
    decisions = choose_prefetch(upcoming, held, num_free_slots=num_free_slots, evictable=held - in_use, depth=depth)
    next_use = next_uses(upcoming, 0)
    fetched = [decision.fetch_chunk for decision in decisions]
    evicted = [decision.evict_chunk for decision in decisions if decision.evict_chunk is not None]
    assert len(set(fetched)) == len(fetched)
    assert len(set(evicted)) == len(evicted)
    assert not held.intersection(fetched)
    assert set(evicted) <= held - in_use
    assert len(fetched) - len(evicted) <= num_free_slots
    for decision in decisions:
        if decision.evict_chunk is not None:
            assert next_use.get(decision.evict_chunk, len(upcoming)) > next_use[decision.fetch_chunk]


def test_prefetch_takes_free_slots_first_and_then_what_is_used_later():
    assert choose_prefetch([1, 2, 3, 9], {7, 9}, num_free_slots=1, evictable={7, 9}, depth=3) == [
        PrefetchDecision(fetch_chunk=1, evict_chunk=None),
        PrefetchDecision(fetch_chunk=2, evict_chunk=7),
        PrefetchDecision(fetch_chunk=3, evict_chunk=9),
    ]


def test_prefetch_leaves_what_is_used_before():
    assert choose_prefetch([1, 2, 3], {1, 2}, num_free_slots=0, evictable={1, 2}, depth=3) == []


def test_prefetch_looks_no_further_than_its_depth():
    assert choose_prefetch([1, 2, 3], {1}, num_free_slots=5, evictable=(), depth=2) == [
        PrefetchDecision(fetch_chunk=2, evict_chunk=None)
    ]
    assert choose_prefetch([1, 2, 3], (), num_free_slots=5, evictable=(), depth=0) == []
