"""Activity in one step, by lane: compute, waits, both directions of copies, the optimizer, host memory, the disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gemini.profile.events import Moment, Stall, Step, Work
from gemini.profile.intervals import Interval, clip, join_close, pack_rows, total_ns
from gemini.profile.recording import Recording

__all__ = ["LANES", "Bar", "bars_of_step", "busy_s_by_lane", "compute_bars", "lane_of", "merge_bars", "rows_of"]

COMPUTE, WAITS = "compute", "waits"
_LANE_OF_OPERATION = {
    "upload": "host to device",
    "download": "device to host",
    "adam update": "optimizer",
    "gradient": "host memory",
    "copy": "host memory",
    "read": "NVMe read",
    "write": "NVMe write",
}
LANES = (COMPUTE, WAITS, *dict.fromkeys(_LANE_OF_OPERATION.values()))
"""Names of the lanes, top to bottom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One activity in a lane."""

    lane: str
    label: str
    """Label: "forward", "read state", ..."""
    chunk_id: int | None = None
    unit_id: int | None = None
    begin_ns: int
    end_ns: int
    nbytes: int = 0

    @property
    def interval(self) -> Interval:
        """Beginning and end."""
        return self.begin_ns, self.end_ns


def lane_of(operation: str) -> str:
    """Return the lane of a native operation."""
    return _LANE_OF_OPERATION.get(operation, "host memory")


def bars_of_step(recording: Recording, step: Step) -> list[Bar]:
    """Return the activities in a step, cut to it, in the order of lanes and times.

    Args:
        recording: the rank's recording.
        step: a step with details.

    Returns:
        The bars; none has length 0.
    """
    window = (step.begin_ns, step.end_ns)
    moments = [moment for moment in recording.moments if window[0] <= moment.at_ns <= window[1]]
    bars = [
        *compute_bars(moments, end_ns=step.end_ns),
        *(_bar_of_stall(stall, window) for stall in recording.stalls),
        *(_bar_of_work(work, window) for work in recording.work),
    ]
    order = {lane: number for number, lane in enumerate(LANES)}
    return sorted(
        (bar for bar in bars if bar.begin_ns < bar.end_ns), key=lambda bar: (order[bar.lane], bar.begin_ns, bar.end_ns)
    )


def _bar_of_stall(stall: Stall, window: Interval) -> Bar:
    begin_ns, end_ns = clip((stall.begin_ns, stall.end_ns), window)
    label = f"wait for {stall.reason}"
    return Bar(lane=WAITS, label=label, chunk_id=stall.chunk_id, begin_ns=begin_ns, end_ns=end_ns)


def _bar_of_work(work: Work, window: Interval) -> Bar:
    begin_ns, end_ns = clip((work.begin_ns, work.end_ns), window)
    return Bar(
        lane=lane_of(work.operation),
        label=f"{work.operation} {work.what}".strip(),
        chunk_id=work.chunk_id,
        begin_ns=begin_ns,
        end_ns=end_ns,
        nbytes=work.nbytes,
    )


def compute_bars(moments: Iterable[Moment], *, end_ns: int) -> list[Bar]:
    """Turn a step's moments into compute's activities: units forward, units backward, and what follows.

    Backward only reports when it reaches a unit. So a unit's backward lasts until the next unit's, and the last one's
    until the optimizer begins. Between the units of a forward, the model's own code runs.

    Args:
        moments: the moments of one step, in order.
        end_ns: end of the step.

    Returns:
        Bars that do not overlap, in order.
    """
    bars: list[Bar] = []
    label, unit_id, since_ns = "", None, 0

    def turn_to(new_label: str, new_unit: int | None, at_ns: int) -> None:
        nonlocal label, unit_id, since_ns
        if label and at_ns > since_ns:
            bars.append(Bar(lane=COMPUTE, label=label, unit_id=unit_id, begin_ns=since_ns, end_ns=at_ns))
        label, unit_id, since_ns = new_label, new_unit, at_ns

    entered: list[int | None] = []
    reached: int | None = None
    for moment in moments:
        if moment.kind == "enter":
            if moment.unit_id == 0:
                entered, reached = [], None
            entered.append(moment.unit_id)
            turn_to("forward" if reached is None else "recompute", moment.unit_id, moment.at_ns)
        elif moment.kind == "leave":
            if moment.unit_id in entered:
                del entered[len(entered) - 1 - entered[::-1].index(moment.unit_id) :]
            if entered:
                turn_to("forward" if reached is None else "recompute", entered[-1], moment.at_ns)
            else:
                turn_to("loss" if reached is None else "backward", reached, moment.at_ns)
        elif moment.kind == "backward":
            entered, reached = [], moment.unit_id
            turn_to("backward", reached, moment.at_ns)
        elif moment.kind == "update":
            turn_to("optimizer step", None, moment.at_ns)
    turn_to("", None, end_ns)
    return bars


def merge_bars(bars: Sequence[Bar], *, gap_ns: int) -> list[Bar]:
    """Merge equal bars that almost touch, so that a picture has no more bars than it can show.

    Args:
        bars: bars of any lanes.
        gap_ns: gaps up to this length are closed.

    Returns:
        Bars that cover the given bars and the closed gaps; bytes are added up.
    """
    groups: dict[tuple[str, str, int | None, int | None], list[Bar]] = defaultdict(list)
    for bar in bars:
        groups[bar.lane, bar.label, bar.chunk_id, bar.unit_id].append(bar)
    merged = []
    for (lane, label, chunk_id, unit_id), alike in groups.items():
        for begin_ns, end_ns in join_close((bar.interval for bar in alike), gap_ns=gap_ns):
            nbytes = sum(bar.nbytes for bar in alike if begin_ns <= bar.begin_ns and bar.end_ns <= end_ns)
            merged.append(
                Bar(
                    lane=lane,
                    label=label,
                    chunk_id=chunk_id,
                    unit_id=unit_id,
                    begin_ns=begin_ns,
                    end_ns=end_ns,
                    nbytes=nbytes,
                )
            )
    return merged


def rows_of(bars: Sequence[Bar]) -> list[int]:
    """Return for each bar the row within its lane, so that no two in a row overlap."""
    rows = [0] * len(bars)
    for lane in LANES:
        places = [index for index, bar in enumerate(bars) if bar.lane == lane]
        for index, row in zip(places, pack_rows([bars[index].interval for index in places]), strict=True):
            rows[index] = row
    return rows


def busy_s_by_lane(bars: Sequence[Bar]) -> dict[str, float]:
    """Return the seconds in which each lane has at least one bar."""
    return {lane: total_ns(bar.interval for bar in bars if bar.lane == lane) / 1e9 for lane in LANES}
