"""Arithmetic of intervals of time: pure functions on pairs of a beginning and an end, in nanoseconds."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

__all__ = ["Interval", "clip", "join_close", "overlap_ns", "pack_rows", "total_ns", "union"]

Interval = tuple[int, int]
"""Beginning and end; an interval of length 0 covers nothing."""


def clip(interval: Interval, window: Interval) -> Interval:
    """Return the part of an interval inside a window; an interval of length 0 if there is none."""
    begin = min(max(interval[0], window[0]), window[1])
    return begin, max(begin, min(interval[1], window[1]))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return what intervals cover together, as sorted ones that do not touch."""
    return join_close(intervals, gap_ns=0)


def join_close(intervals: Iterable[Interval], *, gap_ns: int) -> list[Interval]:
    """Return what intervals cover together, and gaps of at most `gap_ns` between them, as sorted ones further apart."""
    joined: list[Interval] = []
    for begin, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if joined and begin <= joined[-1][1] + gap_ns:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def total_ns(intervals: Iterable[Interval]) -> int:
    """Return how long at least one of the intervals lasts."""
    return sum(end - begin for begin, end in union(intervals))


def overlap_ns(first: Iterable[Interval], second: Iterable[Interval]) -> int:
    """Return how long intervals of both kinds last at once."""
    first, second = union(first), union(second)
    return total_ns(first) + total_ns(second) - total_ns([*first, *second])


def pack_rows(intervals: Sequence[Interval]) -> list[int]:
    """Give each interval a row in which it overlaps no other one, with as few rows as possible.

    Args:
        intervals: intervals in any order.

    Returns:
        The row of each interval, from 0, in the given order.

    Source: interval partitioning, Kleinberg & Tardos, Algorithm Design, section 4.1.
    """
    rows = [0] * len(intervals)
    free: list[int] = []  # rows that are free again
    taken: list[tuple[int, int]] = []  # (end, row) of the others
    num_rows = 0
    for index in sorted(range(len(intervals)), key=lambda i: intervals[i]):
        begin, end = intervals[index]
        while taken and taken[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(taken)[1])
        if free:
            rows[index] = heapq.heappop(free)
        else:
            rows[index], num_rows = num_rows, num_rows + 1
        heapq.heappush(taken, (end, rows[index]))
    return rows
