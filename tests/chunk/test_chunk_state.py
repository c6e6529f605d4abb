"""The life of a chunk: every pair of states is either in the table below or refused."""

from __future__ import annotations

from itertools import product

import pytest

from gemini.chunk.state import ChunkState, check_transition
from gemini.errors import IllegalTransitionError

AT_HOME, FETCHING, READY = ChunkState.AT_HOME, ChunkState.FETCHING, ChunkState.READY
HELD, UPDATING, CLOSED = ChunkState.HELD, ChunkState.UPDATING, ChunkState.CLOSED

ALLOWED = {
    (AT_HOME, FETCHING),  # a fetch starts
    (AT_HOME, READY),  # the home is compute memory
    (AT_HOME, UPDATING),
    (AT_HOME, CLOSED),
    (FETCHING, READY),
    (FETCHING, AT_HOME),  # the fetch failed or was given up
    (FETCHING, CLOSED),
    (READY, HELD),
    (READY, AT_HOME),  # evicted
    (READY, UPDATING),  # resident
    (READY, CLOSED),
    (HELD, READY),
    (HELD, CLOSED),
    (UPDATING, READY),
    (UPDATING, AT_HOME),
    (UPDATING, CLOSED),
}
ILLEGAL = sorted(set(product(ChunkState, ChunkState)) - ALLOWED, key=str)


@pytest.mark.parametrize(("current", "to"), sorted(ALLOWED, key=str))
def test_a_move_in_the_table_is_allowed(current: ChunkState, to: ChunkState) -> None:
    check_transition("chunk 3", current, to)


@pytest.mark.parametrize(("current", "to"), ILLEGAL)
def test_any_other_move_names_chunk_from_and_to(current: ChunkState, to: ChunkState) -> None:
    message = rf"^chunk 3 is {current.value!r} and cannot become {to.value!r}; from here only: "
    with pytest.raises(IllegalTransitionError, match=message):
        check_transition("chunk 3", current, to)


def test_there_are_sixteen_moves_and_twenty_illegal_ones() -> None:
    assert (len(ALLOWED), len(ILLEGAL)) == (16, 20)


def test_the_message_lists_what_is_allowed() -> None:
    with pytest.raises(IllegalTransitionError, match="from here only: closed, ready$"):
        check_transition("chunk 3", HELD, UPDATING)
    with pytest.raises(IllegalTransitionError, match="from here only: nothing$"):
        check_transition("chunk 3", CLOSED, READY)
