"""Follows the order in which chunks are used and fetches what comes next.

What comes next is what came next in the last step of the same kind; a step that goes another way is served on
demand and becomes what the next one is compared with.
"""

from __future__ import annotations

from gemini.chunk.core import ChunkCore
from gemini.placement.prefetch import choose_prefetch
from gemini.placement.tracer import AccessHistory, Phase

__all__ = ["Lookahead"]


class Lookahead:
    """The trace of one engine, and the prefetches that follow from it.

    Args:
        core: chunks and slots; asks this object which chunk is used next.
        depth: chunks to fetch ahead; 0 fetches on demand only.
        num_slots: slots the chunks take turns in.
    """

    def __init__(self, core: ChunkCore, *, depth: int, num_slots: int) -> None:
        self._core = core
        self._depth = depth if num_slots else 0
        self._horizon = depth + num_slots
        self._histories = {phase: AccessHistory() for phase in Phase}
        self._phase = Phase.TRAIN
        self.is_in_step = False
        """Whether a training step has begun and not ended."""
        self._forward_order: dict[int, int] = {}
        core.next_use = lambda chunk_id: self._history.next_use_distance(chunk_id)

    @property
    def _history(self) -> AccessHistory:
        return self._histories[self._phase]

    @property
    def num_mismatches(self) -> int:
        """Uses in training steps that came in another order than in the step before."""
        return self._histories[Phase.TRAIN].num_mismatches

    def begin_forward(self, phase: Phase) -> None:
        """Start following a forward pass; a training step goes on if one has begun."""
        self._phase = phase
        if phase is Phase.INFERENCE or not self.is_in_step:
            self._history.begin_step(phase)
            if phase is Phase.TRAIN:
                self._forward_order.clear()
        self.is_in_step |= phase is Phase.TRAIN

    def end_forward(self) -> None:
        """End a forward pass; one without gradients is a step of its own."""
        if self._phase is Phase.INFERENCE:
            self._history.end_step()
            self._phase = Phase.TRAIN

    def end_step(self) -> None:
        """End a training step; what it used becomes the trace."""
        self._histories[Phase.TRAIN].end_step()
        self.is_in_step = False

    def record(self, chunk_id: int) -> None:
        """Note a use; chunks that never move do not count."""
        if self._phase is Phase.TRAIN:
            self._forward_order.setdefault(chunk_id, len(self._forward_order))
        if not self._core.chunks[chunk_id].is_resident:
            self._history.record(chunk_id)

    def urgency(self, chunk_id: int) -> int:
        """Return how soon the next forward will need a chunk, lower is sooner; those it never notes come first."""
        return self._forward_order.get(chunk_id, -1)

    def needed_soon(self, limit: int) -> tuple[int, ...]:
        """Return the next chunks to be used that take turns in the slots, nearest first."""
        return self._history.upcoming(limit)

    def fetch_ahead(self) -> None:
        """Start the fetches that will be needed soon and cost nothing that is needed sooner."""
        if not self._depth:
            return
        self._core.poll()
        decisions = choose_prefetch(
            self._history.upcoming(self._horizon),
            self._core.in_memory(),
            num_free_slots=self._core.num_free_slots(),
            evictable=self._core.evictable(),
            depth=self._depth,
        )
        for decision in decisions:
            if not self._core.can_prefetch(decision.fetch_chunk):
                break
            if decision.evict_chunk is not None:
                self._core.evict(decision.evict_chunk)
            self._core.prefetch(decision.fetch_chunk)
