"""Traces keep to the format: complete events that nest in their threads, in the order of time, with names."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from recorded import config_for, make_model, record

from gemini import GeminiDDP
from gemini.profile.recording import read_recording
from gemini.profile.trace import chrome_trace


@pytest.mark.parametrize("place", ["disk", "three tiers"])
def test_events_follow_each_other_in_their_threads(place: str, tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for(place, tmp_path)) as engine:
        record(engine, tmp_path / "run", steps=None)
    trace = json.loads(json.dumps(chrome_trace(read_recording(tmp_path / "run"))))
    events = trace["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert all(a["ts"] <= b["ts"] for a, b in pairwise(timed))
    assert all(event["ts"] >= 0 for event in timed)
    by_thread: dict[int, list[dict[str, float]]] = {}
    for event in timed:
        if event["ph"] == "X":
            by_thread.setdefault(event["tid"], []).append(event)
    for own in by_thread.values():
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in pairwise(own))
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert set(names) == set(by_thread)
    assert {"steps", "compute", "optimizer", "NVMe read", "NVMe write"} <= set(names.values())
    assert {event["name"] for event in timed if event["ph"] == "C"} >= {"host memory", "nvme memory"}


def test_waits_carry_their_cause_and_chunk(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        record(engine, tmp_path / "run", steps=None)
    waits = [
        event
        for event in chrome_trace(read_recording(tmp_path / "run"))["traceEvents"]
        if event["name"] == "wait for weights"
    ]
    assert waits
    assert all(event["args"]["chunk"].startswith("chunk ") and event["args"]["cause"] for event in waits)
