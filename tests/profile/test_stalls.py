"""Waits are shared out among their causes to the nanosecond."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gemini.profile.events import ChunkChange, Stall, Work
from gemini.profile.stalls import explain_stall, seconds_by_cause

STALL = Stall("weights", 3, 100, 200)
UPDATE = STALL._replace(reason="update")


def test_a_wait_is_spent_on_its_chunks_own_read_then_on_its_upload() -> None:
    work = [Work("read", "weights", 3, 90, 150, 1), Work("upload", "weights", 3, 150, 190, 1)]
    found = explain_stall(STALL, work, [])
    assert found.spent_ns == {"read weights": 50, "upload weights": 40, "nothing under way": 10}
    assert (found.cause, found.was_late, found.seconds) == ("read weights", False, 100e-9)


def test_while_others_are_read_the_chunk_stands_in_line() -> None:
    work = [Work("write", "state", 7, 80, 170, 1), Work("read", "weights", 3, 170, 200, 1)]
    assert explain_stall(STALL, work, []).spent_ns == {"others first": 70, "read weights": 30}


def test_of_several_things_at_once_the_earliest_stage_counts() -> None:
    work = [Work("adam update", "", 3, 100, 200, 1), Work("read", "state", 3, 100, 200, 1)]
    assert explain_stall(UPDATE, work, []).spent_ns == {"read state": 100}


def test_a_wait_for_weights_is_for_none_of_the_states_work() -> None:
    work = [Work("write", "state", 3, 100, 200, 1), Work("write", "weights", 3, 150, 200, 1)]
    assert explain_stall(STALL, work, []).spent_ns == {"others first": 50, "write weights": 50}


def test_a_fetch_that_begins_in_the_wait_was_late() -> None:
    changes = [ChunkChange(101, 3, "fetching"), ChunkChange(50, 4, "fetching")]
    assert explain_stall(STALL, [], changes).was_late
    assert not explain_stall(STALL, [], [ChunkChange(99, 3, "fetching")]).was_late
    assert not explain_stall(UPDATE, [], changes).was_late


WORK = st.lists(
    st.tuples(st.sampled_from(["read", "upload", "adam update", "write"]), st.integers(2, 4), st.integers(60, 220),
              st.integers(0, 60)).map(lambda t: Work(t[0], "state", t[1], t[2], t[2] + t[3], 1)),
    max_size=12,
)  # fmt: skip


@given(WORK)
def test_causes_add_up_to_the_wait_and_hold_at_every_tick(work: list[Work]) -> None:
    found = explain_stall(UPDATE, work, [])
    assert sum(found.spent_ns.values()) == 100
    assert list(found.spent_ns.values()) == sorted(found.spent_ns.values(), reverse=True)

    def at(tick: int) -> str:
        running = [each for each in work if each.begin_ns <= tick < each.end_ns]
        for operation in ("read", "upload", "adam update", "write"):
            if any(each.chunk_id == 3 and each.operation == operation for each in running):
                return f"{operation} state"
        return "others first" if running else "nothing under way"

    ticks = [at(tick) for tick in range(100, 200)]
    assert found.spent_ns == {cause: ticks.count(cause) for cause in ticks}


def test_causes_of_several_waits_add_up() -> None:
    work = [Work("read", "weights", 3, 100, 200, 1)]
    waits = [explain_stall(STALL, work, []), explain_stall(UPDATE, [], [])]
    waits.append(explain_stall(STALL._replace(end_ns=150), work, []))
    assert seconds_by_cause(waits) == {"weights: read weights": 150e-9, "update: nothing under way": 100e-9}
