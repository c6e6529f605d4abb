"""Lanes of a step: what compute did, by its moments, and bars that neither lose nor invent work."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from recorded import invented

from gemini.profile.events import Moment, Stall, Step, Work
from gemini.profile.lanes import LANES, Bar, bars_of_step, busy_s_by_lane, compute_bars, merge_bars, rows_of
from gemini.profile.series import measured_channels

STEP = Step(0, 100, 200, True, 0.0, 0.0, 0, 0, 0, 0, 0)
OPERATIONS = ("read", "write", "upload", "download", "copy", "gradient", "adam update")


def moments(*pairs: tuple[str, int | None]) -> list[Moment]:
    return [Moment(10 * (index + 1), kind, unit_id) for index, (kind, unit_id) in enumerate(pairs)]


def shape(bars: list[Bar]) -> list[tuple[str, int | None, int, int]]:
    return [(bar.label, bar.unit_id, bar.begin_ns, bar.end_ns) for bar in bars]


def test_a_plain_step_is_forward_loss_backward_and_the_optimizer() -> None:
    found = compute_bars(
        moments(("enter", 0), ("enter", 1), ("leave", 1), ("leave", 0), ("backward", 1), ("update", None)),
        end_ns=70,
    )
    assert shape(found) == [
        ("forward", 0, 10, 20),
        ("forward", 1, 20, 30),
        ("forward", 0, 30, 40),
        ("loss", None, 40, 50),
        ("backward", 1, 50, 60),
        ("optimizer step", None, 60, 70),
    ]


def test_a_unit_entered_in_backward_is_computed_again() -> None:
    found = compute_bars(
        moments(("enter", 0), ("leave", 0), ("backward", 2), ("enter", 2), ("leave", 2), ("update", None)), end_ns=60
    )
    assert shape(found)[2:5] == [("backward", 2, 30, 40), ("recompute", 2, 40, 50), ("backward", 2, 50, 60)]


def test_a_unit_that_checkpointing_leaves_early_ends_with_the_next_one() -> None:
    found = compute_bars(moments(("enter", 0), ("leave", 0), ("backward", 2), ("enter", 2), ("backward", 1)), end_ns=70)
    assert shape(found)[3:] == [("recompute", 2, 40, 50), ("backward", 1, 50, 70)]


def test_a_second_forward_in_a_step_is_no_recomputation() -> None:
    found = compute_bars(moments(("enter", 0), ("leave", 0), ("backward", 1), ("enter", 0)), end_ns=50)
    assert shape(found)[-1] == ("forward", 0, 40, 50)


EVENTS = st.lists(st.tuples(st.sampled_from(["enter", "leave", "backward", "update"]), st.integers(0, 3)), max_size=20)


@given(EVENTS)
def test_compute_does_one_thing_at_a_time_whatever_the_moments(pairs: list[tuple[str, int]]) -> None:
    told = moments(*pairs)
    bars = compute_bars(told, end_ns=10 * (len(told) + 1))
    assert all(bar.begin_ns < bar.end_ns for bar in bars)
    assert all(a.end_ns <= b.begin_ns for a, b in pairwise(bars))


WORK = st.lists(
    st.tuples(
        st.sampled_from(OPERATIONS), st.sampled_from(["weights", "state"]), st.integers(0, 1), st.integers(80, 210),
        st.integers(1, 30), st.integers(0, 9),
    ).map(lambda t: Work(t[0], t[1], t[2], t[3], t[3] + t[4], t[5])),
    max_size=30,
)  # fmt: skip


@given(WORK)
def test_bars_are_the_work_cut_to_the_step(work: list[Work]) -> None:
    recording = invented()
    recording.work.extend(work)
    bars = bars_of_step(recording, STEP)
    inside = [each for each in work if each.begin_ns < 200 and each.end_ns > 100]
    assert sorted((bar.begin_ns, bar.end_ns) for bar in bars) == sorted(
        (max(each.begin_ns, 100), min(each.end_ns, 200)) for each in inside
    )
    assert [LANES.index(bar.lane) for bar in bars] == sorted(LANES.index(bar.lane) for bar in bars)


@given(WORK, st.integers(0, 10))
def test_merging_keeps_bytes_and_loses_no_time(work: list[Work], gap_ns: int) -> None:
    recording = invented()
    recording.work.extend(work)
    bars = bars_of_step(recording, STEP)
    merged = merge_bars(bars, gap_ns=gap_ns)
    assert sum(bar.nbytes for bar in merged) == sum(bar.nbytes for bar in bars)
    before, after = busy_s_by_lane(bars), busy_s_by_lane(merged)
    assert all(after[lane] >= before[lane] for lane in LANES)
    if gap_ns == 0:
        assert after == before


@given(WORK)
def test_no_two_bars_of_a_lanes_row_overlap(work: list[Work]) -> None:
    recording = invented()
    recording.work.extend(work)
    bars = bars_of_step(recording, STEP)
    by_row: dict[tuple[str, int], list[Bar]] = {}
    for bar, row in zip(bars, rows_of(bars), strict=True):
        by_row.setdefault((bar.lane, row), []).append(bar)
    for own in by_row.values():
        assert all(a.end_ns <= b.begin_ns for a, b in pairwise(own))


def test_a_channel_counts_what_runs_at_once_once_and_waits_are_not_compute() -> None:
    recording = invented()
    recording.moments.extend([Moment(100, "enter", 0), Moment(150, "leave", 0), Moment(180, "update", None)])
    recording.stalls.append(Stall("weights", 0, 110, 130))
    recording.work.extend([Work("read", "state", 0, 100, 140, 1), Work("write", "state", 1, 120, 160, 1)])
    found = measured_channels(bars_of_step(recording, STEP))
    assert found == {"compute": 60e-9, "h2d": 0.0, "d2h": 0.0, "host memory": 0.0, "nvme": 60e-9}
