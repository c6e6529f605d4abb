"""Which chunk leaves a slot when another one needs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["farthest_next_use"]


def farthest_next_use(candidates: Iterable[int], next_use: Mapping[int, int]) -> int:
    """Return the candidate whose next use is farthest away, which loads least when the order of uses is known.

    Args:
        candidates: chunk ids that may leave; at least one.
        next_use: for each chunk when it is used next, in any unit that grows with time; a chunk that is not in it is
            taken as never used again.

    Returns:
        The chunk id; among equals the smallest, so that all ranks choose alike.

    Raises:
        ValueError: there is no candidate.

    Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer" (MIN).
    """
    never = max(next_use.values(), default=0) + 1
    return max(candidates, key=lambda chunk_id: (next_use.get(chunk_id, never), -chunk_id))
