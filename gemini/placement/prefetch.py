"""What to fetch ahead of its use, and what may leave for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gemini.placement.eviction import farthest_next_use

__all__ = ["PrefetchDecision", "choose_prefetch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchDecision:
    """One fetch to issue now."""

    fetch_chunk: int
    evict_chunk: int | None
    """Whose slot it takes; None: a free one."""


def choose_prefetch(
    upcoming: Sequence[int],
    in_memory: Collection[int],
    *,
    num_free_slots: int,
    evictable: Collection[int],
    depth: int,
) -> list[PrefetchDecision]:
    """Choose the fetches to issue now, in the order of their urgency.

    What leaves is what is used last of all that may leave, and nothing leaves that is used before the chunk it makes
    room for. A chunk in use cannot leave, so a prefetch may evict what an eviction on demand would have kept a moment
    later; over forward and backward in turn, with a slot to spare, it costs no fetch more.

    Args:
        upcoming: chunk ids in the order of their next use. The more it tells beyond `depth`, the better the choice of
            what leaves; a chunk that is not in it is taken as used after all that are.
        in_memory: chunks that are in compute memory or on their way to it.
        num_free_slots: slots that hold nothing.
        evictable: chunks in slots that nobody uses now.
        depth: how many of the upcoming chunks to look at: GeminiConfig.prefetch_depth.

    Returns:
        The fetches; no chunk is fetched or evicted twice.

    Source: Cao, Felten, Karlin and Li 1995, "A study of integrated prefetching and caching strategies": optimal
    fetching, optimal replacement and do no harm.
    """
    order = list(dict.fromkeys(upcoming))
    next_use = {chunk_id: position for position, chunk_id in enumerate(order)}
    leavable = set(evictable)
    decisions: list[PrefetchDecision] = []
    for position, chunk_id in enumerate(order[: max(depth, 0)]):
        if chunk_id in in_memory:
            continue
        if num_free_slots > 0:
            num_free_slots -= 1
            decisions.append(PrefetchDecision(fetch_chunk=chunk_id, evict_chunk=None))
            continue
        if not leavable:
            break
        victim = farthest_next_use(leavable, next_use)
        if next_use.get(victim, len(order)) < position:
            break
        leavable.remove(victim)
        decisions.append(PrefetchDecision(fetch_chunk=chunk_id, evict_chunk=victim))
    return decisions
