"""In which order a step uses chunks: recorded once, then followed to tell what comes next.

Chunks are ids here; nothing is known of modules or tensors.
"""

from __future__ import annotations

import enum
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence

__all__ = ["NEVER", "AccessHistory", "Phase", "UseTrace"]

NEVER = sys.maxsize
"""Distance to a use that no trace knows of."""


class Phase(enum.Enum):
    """Kinds of steps; each has an order of its own."""

    TRAIN = "train"
    """Forward and backward."""
    INFERENCE = "inference"
    """Forward only."""


class AccessHistory:
    """The order in which chunks are used, in this step and in the last complete one.

    A cursor follows the last complete step. A use that comes in another order moves it to the next place where the
    chunk is used, so that prediction goes on from there; a step whose uses are all as before costs nothing to keep.
    """

    def __init__(self) -> None:
        self._trace: _Trace | None = None
        self._is_in_step = False
        self._cursor = -1  # position in the trace of the use recorded last
        self._chunk_ids: list[int] = []
        self._num_mismatches = 0

    @property
    def num_mismatches(self) -> int:
        """Uses that were not the one the trace had next; those made while there was no trace do not count."""
        return self._num_mismatches

    def begin_step(self) -> None:
        """Start a step; one that was not ended is forgotten."""
        self._is_in_step = True
        self._cursor = -1
        self._chunk_ids = []

    def end_step(self) -> None:
        """Keep the uses since `begin_step` as the order to follow, if there were any."""
        if self._is_in_step and self._chunk_ids and (self._trace is None or self._trace.chunk_ids != self._chunk_ids):
            self._trace = _Trace(self._chunk_ids)
        self._is_in_step = False
        self._cursor = -1

    @property
    def order(self) -> tuple[int, ...]:
        """The uses of the last complete step; empty if there was none."""
        return () if self._trace is None else tuple(self._trace.chunk_ids)

    def restore(self, order: Sequence[int]) -> None:
        """Take uses, at least one, for those of the last complete step; between steps."""
        self._trace = _Trace(list(order))

    def record(self, chunk_id: int) -> None:
        """Note that a chunk is used."""
        if self._is_in_step:
            self._chunk_ids.append(chunk_id)
        trace = self._trace
        if trace is None:
            return
        expected = (self._cursor + 1) % len(trace.chunk_ids)
        if trace.chunk_ids[expected] == chunk_id:
            self._cursor = expected
            return
        self._num_mismatches += 1
        if self._cursor >= 0 and trace.chunk_ids[self._cursor] == chunk_id:
            return  # used again, as activation checkpointing does
        position = trace.next_position(chunk_id, self._cursor)
        if position is not None:
            self._cursor = position

    def upcoming(self, limit: int, *, looks_past_end: bool = True) -> tuple[int, ...]:
        """Return the next distinct chunks, nearest first; after the end of the step the next one begins alike.

        Args:
            limit: the most chunks to return.
            looks_past_end: whether chunks of the next step are among them.

        Returns:
            Chunk ids; empty if no complete step is known. The chunk used last is among them if it comes again.
        """
        trace = self._trace
        if trace is None or limit <= 0:
            return ()
        found: dict[int, None] = {}
        num_uses = len(trace.chunk_ids)
        num_left = num_uses if looks_past_end else num_uses - 1 - self._cursor
        for offset in range(1, num_left + 1):
            found[trace.chunk_ids[(self._cursor + offset) % num_uses]] = None
            if len(found) == limit or len(found) == len(trace.positions):
                break
        return tuple(found)

    def next_use_distance(self, chunk_id: int) -> int:
        """Return how many uses ahead the next use of a chunk is: 1 is the very next, NEVER if no trace has it."""
        trace = self._trace
        position = None if trace is None else trace.next_position(chunk_id, self._cursor)
        if trace is None or position is None:
            return NEVER
        return position - self._cursor if position > self._cursor else position - self._cursor + len(trace.chunk_ids)


class UseTrace:
    """The histories of one engine, one for each phase, of which the phase under way counts."""

    def __init__(self) -> None:
        self._histories = {phase: AccessHistory() for phase in Phase}
        self.phase = Phase.TRAIN
        """The phase under way, or about to begin."""

    @property
    def num_mismatches(self) -> int:
        """Uses in training steps that came in another order than in the step before."""
        return self._histories[Phase.TRAIN].num_mismatches

    @property
    def orders(self) -> dict[Phase, tuple[int, ...]]:
        """The order of uses in the last complete step of each phase that has one."""
        return {phase: history.order for phase, history in self._histories.items() if history.order}

    def restore(self, orders: Mapping[Phase, Sequence[int]]) -> None:
        """Take orders, none of them empty, for those of the last complete steps; between steps."""
        for phase, order in orders.items():
            self._histories[phase].restore(order)

    def begin_step(self, phase: Phase) -> None:
        """Start a step; one of this phase that was not ended is forgotten."""
        self.phase = phase
        self._histories[phase].begin_step()

    def end_step(self, phase: Phase) -> None:
        """Keep what a step has used as the order of its phase."""
        self._histories[phase].end_step()

    def record(self, chunk_id: int) -> None:
        """Note that a chunk is used."""
        self._histories[self.phase].record(chunk_id)

    def upcoming(self, limit: int, *, looks_past_end: bool = True) -> tuple[int, ...]:
        """Return the next distinct chunks, nearest first; see AccessHistory."""
        return self._histories[self.phase].upcoming(limit, looks_past_end=looks_past_end)

    def next_use_distance(self, chunk_id: int) -> int:
        """Return how many uses ahead the next use of a chunk is; see AccessHistory."""
        return self._histories[self.phase].next_use_distance(chunk_id)


class _Trace:
    """The uses of a complete step, and where each chunk occurs among them."""

    def __init__(self, chunk_ids: list[int]) -> None:
        self.chunk_ids = chunk_ids
        self.positions: dict[int, list[int]] = {}
        for position, chunk_id in enumerate(chunk_ids):
            self.positions.setdefault(chunk_id, []).append(position)

    def next_position(self, chunk_id: int, cursor: int) -> int | None:
        """Return where the chunk occurs next after the cursor, from the start again after the end."""
        positions = self.positions.get(chunk_id)
        if positions is None:
            return None
        return positions[bisect_right(positions, cursor) % len(positions)]
