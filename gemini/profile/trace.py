"""A recording as a trace for ui.perfetto.dev and chrome://tracing.

Format: "Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from typing import Any

from gemini.profile.events import MemorySample
from gemini.profile.lanes import LANES, Bar, bars_of_step, rows_of
from gemini.profile.recording import Recording
from gemini.profile.stalls import ExplainedStall, stalls_of_step

__all__ = ["chrome_trace"]

STEP_THREAD = 0
MAX_ROWS_PER_LANE = 1000
"""Maximum number of rows in a lane; threads are numbered by lane, then by row."""


def chrome_trace(recording: Recording) -> dict[str, Any]:
    """Return a recording's steps with details as trace events.

    A lane is a thread, or several threads where its bars overlap; the bars of a thread do not overlap. The bytes of
    each tier are a counter.

    Args:
        recording: one rank's recording.

    Returns:
        The data to write as JSON; events in the order of time, in microseconds since the recording began.
    """
    rank, began_ns = recording.run.rank, recording.run.began_ns

    def microseconds(at_ns: int) -> float:
        return (at_ns - began_ns) / 1e3

    events: list[dict[str, Any]] = []
    threads = {STEP_THREAD: "steps"}
    for step in recording.detailed_steps:
        span = {"ts": microseconds(step.begin_ns), "dur": (step.end_ns - step.begin_ns) / 1e3}
        events.append({"ph": "X", "pid": rank, "tid": STEP_THREAD, "name": f"step {step.number}", **span})
        bars = bars_of_step(recording, step)
        why = {(each.stall.chunk_id, each.stall.begin_ns): each for each in stalls_of_step(recording, step)}
        for bar, row in zip(bars, rows_of(bars), strict=True):
            thread = 1 + LANES.index(bar.lane) * MAX_ROWS_PER_LANE + row
            threads.setdefault(thread, bar.lane if row == 0 else f"{bar.lane} ({row + 1})")
            arguments = _arguments(bar, recording, why)
            events.append(
                {
                    "ph": "X",
                    "pid": rank,
                    "tid": thread,
                    "name": bar.label,
                    "ts": microseconds(bar.begin_ns),
                    "dur": (bar.end_ns - bar.begin_ns) / 1e3,
                    "args": arguments,
                }
            )
    for sample in recording.samples:
        counted = {"ph": "C", "pid": rank, "name": f"{sample.tier} memory", "ts": microseconds(sample.at_ns)}
        events.append({**counted, "args": _counts(sample)})
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    names = [
        {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}},
        *(
            {"ph": "M", "pid": rank, "tid": thread, "name": "thread_name", "args": {"name": name}}
            for thread, name in sorted(threads.items())
        ),
        *(
            {"ph": "M", "pid": rank, "tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}
            for thread in sorted(threads)
        ),
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


def _arguments(bar: Bar, recording: Recording, why: dict[tuple[int, int], ExplainedStall]) -> dict[str, Any]:
    """Return the details that a viewer shows for a bar."""
    arguments: dict[str, Any] = {}
    if bar.chunk_id is not None:
        arguments["chunk"] = recording.run.chunks[bar.chunk_id].name
        if bar.lane == "waits" and (bar.chunk_id, bar.begin_ns) in why:
            explained = why[bar.chunk_id, bar.begin_ns]
            arguments |= {"cause": explained.cause, "was_late": explained.was_late}
    if bar.unit_id is not None:
        arguments["unit"] = recording.run.units[bar.unit_id]
    if bar.nbytes:
        arguments["nbytes"] = bar.nbytes
    return arguments


def _counts(sample: MemorySample) -> dict[str, int]:
    other = {} if sample.other_nbytes is None else {"not the engine's": sample.other_nbytes}
    return {**sample.held_nbytes, **other}
