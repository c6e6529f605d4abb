"""Follows the order in which chunks are used and fetches what comes next.

The order of the last step of the same kind predicts the next uses. A step that takes another order is served on demand,
and its order becomes the new prediction.

[Note: Same order on all ranks]
Ranks gather chunks together, so each must start the same gathers in the same order. Timing differs between ranks, so
the end of a read or of an update must not decide. With several ranks, everything here therefore follows from the order
of uses alone, which is the same as long as all ranks run the same units in the same order. A rank that must wait for a
read or an update before the next gather does so. Only reads run ahead of it, into slots chosen by the same rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gemini.chunk.core import ChunkCore
from gemini.placement.prefetch import choose_prefetch
from gemini.placement.tracer import Phase, UseTrace

__all__ = ["Lookahead"]


class Lookahead:
    """The trace of one engine, and the prefetches that follow from it.

    Args:
        core: chunks and slots.
        trace: the order in which chunks are used.
        depth: chunks to fetch ahead; 0 fetches on demand only.
        num_slots: slots the chunks take turns in.
        is_sharded: whether several ranks own the chunks, so that residents come anew after every update; see
            [Note: Same order on all ranks].
    """

    def __init__(
        self, core: ChunkCore, trace: UseTrace, *, depth: int, num_slots: int, is_sharded: bool = False
    ) -> None:
        self._core = core
        self._trace = trace
        self._depth = depth if num_slots or is_sharded else 0
        self._is_sharded = is_sharded
        num_residents = sum(chunk.is_resident and chunk.shard is not None for chunk in core.chunks)
        self._horizon = depth + num_slots + num_residents
        self.is_in_step = False
        """Whether a training step has begun and not ended."""
        self._forward_order: dict[int, int] = {}

    @property
    def num_mismatches(self) -> int:
        """Uses in training steps that came in another order than in the step before."""
        return self._trace.num_mismatches

    def begin_forward(self, phase: Phase) -> None:
        """Start following a forward pass; it continues a training step if one has begun."""
        self._trace.phase = phase
        if phase is Phase.INFERENCE or not self.is_in_step:
            self._trace.begin_step(phase)
            if phase is Phase.TRAIN:
                self._forward_order.clear()
        self.is_in_step |= phase is Phase.TRAIN

    def end_forward(self) -> None:
        """End a forward pass; a pass without gradients is a separate step."""
        if self._trace.phase is Phase.INFERENCE:
            self._trace.end_step(Phase.INFERENCE)
            self._trace.phase = Phase.TRAIN

    def end_step(self) -> None:
        """End a training step; what it used becomes the trace."""
        self._trace.end_step(Phase.TRAIN)
        self.is_in_step = False

    def record(self, chunk_id: int) -> None:
        """Note a use; chunks that never move, nor change elsewhere, do not count."""
        if self._trace.phase is Phase.TRAIN:
            self._forward_order.setdefault(chunk_id, len(self._forward_order))
        if self._moves(chunk_id):
            self._trace.record(chunk_id)

    def _moves(self, chunk_id: int) -> bool:
        chunk = self._core.chunks[chunk_id]
        return chunk.shard is not None or not chunk.is_resident

    def distance(self, chunk_id: int) -> int:
        """Return how soon the next forward will need a chunk, lower is sooner; those it never notes come first."""
        return self._forward_order.get(chunk_id, -1)

    def needed_soon(self, limit: int) -> tuple[int, ...]:
        """Return the next chunks to be used that take turns in the slots, nearest first."""
        return self._trace.upcoming(limit)

    def state_dict(self) -> dict[str, list[str]]:
        """Return the order of uses in the last complete step of each phase, as names of chunks."""
        orders = self._trace.orders
        return {phase.value: [self._core.chunks[i].name for i in order] for phase, order in orders.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[str]]) -> None:
        """Follow the orders of another engine of the same model; one that names a chunk that is not here is dropped."""
        ids = {chunk.name: chunk_id for chunk_id, chunk in enumerate(self._core.chunks)}
        orders = {}
        for phase in Phase:
            names = state.get(phase.value, ())
            order = [ids[name] for name in names if name in ids and self._moves(ids[name])]
            if order and all(name in ids for name in names):
                orders[phase] = order
        self._trace.restore(orders)
        if Phase.TRAIN in orders:
            distinct = dict.fromkeys(orders[Phase.TRAIN])
            self._forward_order = {chunk_id: place for place, chunk_id in enumerate(distinct)}

    def fetch_ahead(self) -> None:
        """Start the fetches that will be needed soon and cost nothing that is needed sooner."""
        if not self._depth:
            return
        self._core.poll()
        if self._is_sharded:
            # What is gathered before the step's update must be gathered again after it.
            self._gather_ahead(self._trace.upcoming(self._horizon, looks_past_end=not self.is_in_step))
            return
        decisions = choose_prefetch(
            self._trace.upcoming(self._horizon),
            self._core.slots.chunk_ids(),
            num_free_slots=self._core.slots.num_free(),
            evictable=self._core.slots.evictable(),
            depth=self._depth,
        )
        for decision in decisions:
            if not self._core.can_prefetch(decision.fetch_chunk):
                break
            if decision.evict_chunk is not None:
                self._core.evict(decision.evict_chunk)
            self._core.prefetch(decision.fetch_chunk)

    def gather_now(self, chunk_ids: Sequence[int]) -> None:
        """Make resident chunks usable, all at the same time; waits for their updates."""
        for chunk_id in chunk_ids:
            self._core.prefetch(chunk_id)
        for chunk_id in chunk_ids:
            self._core.begin_gather(chunk_id)
        for chunk_id in chunk_ids:
            self._core.ensure(chunk_id)

    def _gather_ahead(self, upcoming: Sequence[int]) -> None:
        """Start reading shards and gathering the nearest ones, even if this rank has to wait."""
        residents = [chunk_id for chunk_id in upcoming if self._core.chunks[chunk_id].is_resident]
        decisions = choose_prefetch(
            [chunk_id for chunk_id in upcoming if chunk_id not in residents],
            self._core.slots.chunk_ids(),
            num_free_slots=self._core.slots.num_free(),
            evictable=self._core.slots.evictable(),
            depth=self._depth,
        )
        for decision in decisions:
            if decision.evict_chunk is not None:
                self._core.evict(decision.evict_chunk)
            self._core.prefetch(decision.fetch_chunk)
        for chunk_id in upcoming[: self._depth]:
            if chunk_id in residents:
                self._core.prefetch(chunk_id)
        for chunk_id in upcoming[: max(self._depth - 1, 1)]:
            self._core.begin_gather(chunk_id)
