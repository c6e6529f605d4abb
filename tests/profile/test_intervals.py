"""Arithmetic of intervals, against counting each nanosecond."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gemini.profile.intervals import clip, join_close, overlap_ns, pack_rows, total_ns, union

INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))))


def covered(intervals: list[tuple[int, int]]) -> set[int]:
    return {tick for begin, end in intervals for tick in range(begin, end)}


@given(INTERVALS)
def test_a_union_covers_the_same_and_no_tick_twice(intervals: list[tuple[int, int]]) -> None:
    found = union(intervals)
    assert covered(found) == covered(intervals)
    assert total_ns(intervals) == len(covered(intervals)) == sum(end - begin for begin, end in found)
    assert all(end < begin for (_, end), (begin, _) in pairwise(found))


@given(INTERVALS, st.integers(0, 5))
def test_joining_fills_gaps_up_to_a_length_and_no_others(intervals: list[tuple[int, int]], gap_ns: int) -> None:
    found = join_close(intervals, gap_ns=gap_ns)
    assert covered(found) >= covered(intervals)
    assert all(begin - end > gap_ns for (_, end), (begin, _) in pairwise(found))
    apart = union(intervals)
    gaps = [(end, begin) for (_, end), (begin, _) in pairwise(apart)]
    assert covered(found) - covered(intervals) == covered([gap for gap in gaps if gap[1] - gap[0] <= gap_ns])


@given(INTERVALS, INTERVALS)
def test_overlap_is_what_both_cover(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    assert overlap_ns(first, second) == len(covered(first) & covered(second))


@given(st.tuples(st.integers(0, 40), st.integers(40, 60)), st.tuples(st.integers(0, 40), st.integers(40, 60)))
def test_clipping_leaves_what_is_inside(interval: tuple[int, int], window: tuple[int, int]) -> None:
    assert covered([clip(interval, window)]) == covered([interval]) & covered([window])


def test_what_lies_outside_is_cut_to_nothing() -> None:
    assert clip((1, 2), (5, 9)) == (5, 5)
    assert clip((10, 12), (5, 9)) == (9, 9)


@given(INTERVALS)
def test_rows_hold_no_two_at_once_and_are_as_few_as_the_depth(intervals: list[tuple[int, int]]) -> None:
    intervals = [interval for interval in intervals if interval[0] < interval[1]]
    rows = pack_rows(intervals)
    for row in set(rows):
        own = [interval for interval, other in zip(intervals, rows, strict=True) if other == row]
        assert sum(end - begin for begin, end in own) == len(covered(own))
    depth = max((sum(begin <= tick < end for begin, end in intervals) for tick in covered(intervals)), default=0)
    assert len(set(rows)) == depth
