"""The life of a chunk's working weights, as one enum and one table."""

from __future__ import annotations

import enum
from typing import Protocol

from gemini.errors import IllegalTransitionError

__all__ = ["ChunkState", "ChunkUpdater", "check_transition"]


class ChunkState(enum.Enum):
    """Where a chunk is in its life. In every state the home holds the truth unless said otherwise."""

    AT_HOME = "at home"
    """Only the home holds the weights; parameters show a placeholder."""
    FETCHING = "fetching"
    """A copy to compute memory is under way; parameters still show a placeholder."""
    READY = "ready"
    """Compute memory holds the weights and parameters show them; they may be evicted."""
    HELD = "held"
    """As READY, in use by at least one module; must not move."""
    UPDATING = "updating"
    """The optimizer is writing home and, where it stays, the compute copy; nobody may read either."""
    CLOSED = "closed"
    """Gone."""


class ChunkUpdater(Protocol):
    """Who updates chunks while others may want them."""

    def is_finished(self, chunk_id: int) -> bool:
        """Return whether `finish` would return at once."""

    def finish(self, chunk_id: int) -> None:
        """Wait until a chunk's update is complete, and call `end_update`."""


_ALLOWED = {
    ChunkState.AT_HOME: {ChunkState.FETCHING, ChunkState.READY, ChunkState.UPDATING, ChunkState.CLOSED},
    ChunkState.FETCHING: {ChunkState.READY, ChunkState.AT_HOME, ChunkState.CLOSED},
    ChunkState.READY: {ChunkState.HELD, ChunkState.AT_HOME, ChunkState.UPDATING, ChunkState.CLOSED},
    ChunkState.HELD: {ChunkState.READY, ChunkState.CLOSED},
    ChunkState.UPDATING: {ChunkState.READY, ChunkState.AT_HOME, ChunkState.CLOSED},
    ChunkState.CLOSED: set(),
}


def check_transition(chunk_name: str, current: ChunkState, to: ChunkState) -> None:
    """Refuse a move the table does not allow.

    Args:
        chunk_name: what to call the chunk in the error.
        current: state it is in.
        to: state it is asked to enter.

    Raises:
        IllegalTransitionError: the table has no such move.
    """
    if to not in _ALLOWED[current]:
        allowed = ", ".join(sorted(state.value for state in _ALLOWED[current])) or "nothing"
        raise IllegalTransitionError(
            f"{chunk_name} is {current.value!r} and cannot become {to.value!r}; from here only: {allowed}"
        )
