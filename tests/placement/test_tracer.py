"""The order of accesses is learnt from a step and followed in the next ones."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.placement.tracer import NEVER, AccessHistory, Phase, UseTrace

STEP = [0, 1, 2, 3, 3, 2, 1, 0]


def traced(order: list[int]) -> AccessHistory:
    history = AccessHistory()
    record_step(history, order)
    return history


def record_step(history: AccessHistory, order: list[int]) -> None:
    history.begin_step()
    for chunk_id in order:
        history.record(chunk_id)
    history.end_step()


def test_first_step_predicts_nothing_and_counts_no_mismatch():
    history = AccessHistory()
    history.begin_step()
    history.record(4)
    assert history.order == ()
    assert history.upcoming(3) == ()
    assert history.next_use_distance(4) == NEVER
    assert history.num_mismatches == 0


def test_upcoming_chunks_are_distinct_and_nearest_first():
    history = traced(STEP)
    history.begin_step()
    assert history.upcoming(3) == (0, 1, 2)
    for chunk_id in (0, 1, 2):
        history.record(chunk_id)
    assert history.upcoming(10) == (3, 2, 1, 0)


def test_upcoming_goes_on_with_the_start_of_the_next_step():
    history = traced([5, 6, 7])
    history.begin_step()
    for chunk_id in (5, 6, 7):
        history.record(chunk_id)
    assert history.upcoming(2) == (5, 6)


def test_upcoming_ends_with_the_step_if_asked():
    history = traced([5, 6, 7])
    history.begin_step()
    history.record(5)
    assert history.upcoming(9, looks_past_end=False) == (6, 7)
    history.record(6)
    history.record(7)
    assert history.upcoming(9, looks_past_end=False) == ()


def test_next_use_distance_counts_accesses_and_wraps():
    history = traced(STEP)
    history.begin_step()
    assert history.next_use_distance(0) == 1
    for chunk_id in (0, 1, 2, 3, 3):
        history.record(chunk_id)
    assert [history.next_use_distance(chunk_id) for chunk_id in (2, 1, 0, 3)] == [1, 2, 3, 7]
    assert history.next_use_distance(99) == NEVER


def test_equal_steps_have_no_mismatch():
    history = traced(STEP)
    record_step(history, STEP)
    record_step(history, STEP)
    assert history.num_mismatches == 0


def test_skipped_chunk_moves_the_cursor_past_it():
    history = traced([0, 1, 2, 3, 4])
    history.begin_step()
    history.record(0)
    history.record(2)
    assert history.num_mismatches == 1
    assert history.upcoming(2) == (3, 4)


def test_chunk_used_again_leaves_the_cursor_where_it_is():
    history = traced([0, 1, 2])
    history.begin_step()
    history.record(0)
    history.record(0)
    assert history.num_mismatches == 1
    assert history.upcoming(1) == (1,)


def test_unknown_chunk_is_a_mismatch_and_the_next_step_knows_it():
    history = traced([0, 1])
    record_step(history, [0, 9, 1])
    assert history.num_mismatches == 1
    history.begin_step()
    history.record(0)
    assert history.upcoming(1) == (9,)


def test_order_that_changed_is_followed_from_the_next_step_on():
    history = traced([0, 1, 2])
    record_step(history, [2, 1, 0])
    mismatches = history.num_mismatches
    assert mismatches > 0
    record_step(history, [2, 1, 0])
    assert history.num_mismatches == mismatches


def test_phases_have_traces_of_their_own():
    trace = UseTrace()
    for phase, order in ((Phase.TRAIN, STEP), (Phase.INFERENCE, [0, 1, 2, 3])):
        trace.begin_step(phase)
        for chunk_id in order:
            trace.record(chunk_id)
        trace.end_step(phase)
    assert trace.orders == {Phase.TRAIN: tuple(STEP), Phase.INFERENCE: (0, 1, 2, 3)}

    trace.begin_step(Phase.TRAIN)
    for chunk_id in (0, 1, 2, 3):
        trace.record(chunk_id)
    assert trace.upcoming(1) == (3,)
    assert trace.next_use_distance(2) == 2
    trace.begin_step(Phase.INFERENCE)
    for chunk_id in (0, 1, 2, 3):
        trace.record(chunk_id)
    assert trace.upcoming(1) == (0,)
    assert trace.next_use_distance(2) == 3


def test_orders_that_are_restored_are_followed():
    trace = UseTrace()
    trace.restore({Phase.TRAIN: [4, 2, 3]})
    trace.begin_step(Phase.TRAIN)
    trace.record(4)
    assert trace.upcoming(2) == (2, 3)
    assert trace.num_mismatches == 0


def test_step_without_accesses_or_without_end_keeps_the_old_trace():
    history = traced([0, 1])
    record_step(history, [])
    history.begin_step()
    history.record(7)
    history.begin_step()
    assert history.upcoming(5) == (0, 1)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_upcoming_equals_a_search_through_the_trace(order, data):
    history = traced(order)
    history.begin_step()
    num_recorded = data.draw(st.integers(0, len(order)))
    for chunk_id in order[:num_recorded]:
        history.record(chunk_id)
    rotated = order[num_recorded:] + order[:num_recorded]
    assert history.upcoming(len(order)) == tuple(dict.fromkeys(rotated))
    for chunk_id in set(order):
        assert history.next_use_distance(chunk_id) == rotated.index(chunk_id) + 1
