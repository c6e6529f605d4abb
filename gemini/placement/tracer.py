"""What a step does, in which order: recorded once, then used to tell what comes next.

The tracer knows ids of units; it knows neither modules nor tensors.
"""

from __future__ import annotations

import enum
import sys
from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["NEVER", "AccessHistory", "Phase"]

NEVER = sys.maxsize
"""Distance to a use that no trace knows of."""


class Phase(enum.Enum):
    """Kinds of steps; each has an order of its own."""

    TRAIN = "train"
    """Forward and backward."""
    INFERENCE = "inference"
    """Forward only."""


class AccessHistory:
    """The order in which units are entered, this step and in the last complete step of the same phase.

    A cursor follows the last complete step. An access that comes in another order moves it to the next place where the
    unit is used, so that prediction goes on from there; a step whose accesses are all as before costs nothing to keep.
    """

    def __init__(self) -> None:
        self._traces: dict[Phase, _Trace] = {}
        self._phase: Phase | None = None
        self._is_in_step = False
        self._cursor = -1  # position in the trace of the access recorded last
        self._units: list[int] = []
        self._num_mismatches = 0

    @property
    def num_mismatches(self) -> int:
        """Accesses that were not the one the trace had next; those made while there was no trace do not count."""
        return self._num_mismatches

    def begin_step(self, phase: Phase) -> None:
        """Start a step; one that was not ended is forgotten.

        Args:
            phase: its kind.
        """
        self._phase = phase
        self._is_in_step = True
        self._cursor = -1
        self._units = []

    def end_step(self) -> None:
        """Keep the accesses since `begin_step` as the order of their phase, if there were any."""
        if self._is_in_step and self._phase is not None and self._units:
            previous = self._traces.get(self._phase)
            if previous is None or previous.units != self._units:
                self._traces[self._phase] = _Trace(self._units)
        self._is_in_step = False
        self._cursor = -1

    def order_of(self, phase: Phase) -> tuple[int, ...]:
        """Return the accesses of the last complete step of a phase; empty if there was none."""
        trace = self._traces.get(phase)
        return () if trace is None else tuple(trace.units)

    def restore(self, phase: Phase, units: Sequence[int]) -> None:
        """Take accesses, at least one, for the last complete step of a phase; between steps."""
        self._traces[phase] = _Trace(list(units))

    def record(self, unit_id: int) -> None:
        """Note that a unit is entered."""
        if self._is_in_step:
            self._units.append(unit_id)
        trace = self._trace
        if trace is None:
            return
        expected = (self._cursor + 1) % len(trace.units)
        if trace.units[expected] == unit_id:
            self._cursor = expected
            return
        self._num_mismatches += 1
        if self._cursor >= 0 and trace.units[self._cursor] == unit_id:
            return  # entered again, as activation checkpointing does
        position = trace.next_position(unit_id, self._cursor)
        if position is not None:
            self._cursor = position

    def upcoming(self, limit: int, *, looks_past_end: bool = True) -> tuple[int, ...]:
        """Return the next distinct units, nearest first; after the end of the step the next one begins alike.

        Args:
            limit: the most units to return.
            looks_past_end: whether units of the next step are among them.

        Returns:
            Unit ids; empty if no step of this phase is known. The unit entered last is among them if it comes again.
        """
        trace = self._trace
        if trace is None or limit <= 0:
            return ()
        found: dict[int, None] = {}
        num_units = len(trace.units)
        num_left = num_units if looks_past_end else num_units - 1 - self._cursor
        for offset in range(1, num_left + 1):
            found[trace.units[(self._cursor + offset) % num_units]] = None
            if len(found) == limit or len(found) == len(trace.positions):
                break
        return tuple(found)

    def next_use_distance(self, unit_id: int) -> int:
        """Return how many accesses ahead the next use of a unit is: 1 is the very next, NEVER if no trace has it."""
        trace = self._trace
        position = None if trace is None else trace.next_position(unit_id, self._cursor)
        if trace is None or position is None:
            return NEVER
        return position - self._cursor if position > self._cursor else position - self._cursor + len(trace.units)

    @property
    def _trace(self) -> _Trace | None:
        return None if self._phase is None else self._traces.get(self._phase)


class _Trace:
    """The accesses of a complete step, and where each unit occurs among them."""

    def __init__(self, units: list[int]) -> None:
        self.units = units
        self.positions: dict[int, list[int]] = {}
        for position, unit_id in enumerate(units):
            self.positions.setdefault(unit_id, []).append(position)

    def next_position(self, unit_id: int, cursor: int) -> int | None:
        """Return where the unit occurs next after the cursor, from the start again after the end."""
        positions = self.positions.get(unit_id)
        if positions is None:
            return None
        return positions[bisect_right(positions, cursor) % len(positions)]
