"""When copies ran on a CUDA device: events around each, put on the host's clock by one that both have seen."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from gemini.kernels.spans import MAX_SPANS, Span

__all__ = ["CudaSpans", "TimedEvent"]


class TimedEvent(Protocol):
    """`torch.cuda.Event(enable_timing=True)`, as far as this module knows it."""

    def query(self) -> bool:
        """Return whether the device has come to it."""

    def synchronize(self) -> None:
        """Block until it has."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from here to a later event."""


class CudaSpans:
    """The spans of one device's copies. Used by one thread at a time for each method.

    Args:
        record_event: puts an event with timing on the stream that is current, and returns it.
    """

    def __init__(self, record_event: Callable[[], TimedEvent]) -> None:
        self._anchor = record_event()
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()
        self._record_event = record_event
        self._pairs: deque[tuple[int, TimedEvent, TimedEvent]] = deque(maxlen=MAX_SPANS)
        self._next_ticket = 1

    def begin(self) -> TimedEvent:
        """Note that a copy is about to be put on the stream that is current."""
        return self._record_event()

    def end(self, begin: TimedEvent) -> int:
        """Note that it has been, and return its ticket."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._pairs.append((ticket, begin, self._record_event()))
        return ticket

    def take(self) -> list[Span]:
        """Return the spans of copies that have ended since the last call; stops at the first that has not."""
        spans = []
        while self._pairs and self._pairs[0][2].query():
            ticket, begin, end = self._pairs.popleft()
            spans.append(Span(ticket, self._host_ns(begin), self._host_ns(end)))
        return spans

    def _host_ns(self, event: TimedEvent) -> int:
        return self._anchor_ns + round(self._anchor.elapsed_time(event) * 1e6)
