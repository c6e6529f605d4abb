"""Times of copies on a device: events around each copy, converted to the host's clock by a common event."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from gemini.kernels.spans import MAX_SPANS, Span
from gemini.offload.accelerator import Event

__all__ = ["DeviceSpans"]


class DeviceSpans:
    """The spans of one device's copies. Each method is called by one thread at a time.

    Args:
        record_event: records an event with timing on the current stream, and returns it.
    """

    def __init__(self, record_event: Callable[[], Event]) -> None:
        self._anchor = record_event()
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()
        self._record_event = record_event
        self._pairs: deque[tuple[int, Event, Event]] = deque(maxlen=MAX_SPANS)
        self._next_ticket = 1

    def begin(self) -> Event:
        """Note that a copy is about to be submitted to the current stream."""
        return self._record_event()

    def end(self, begin: Event) -> int:
        """Note that the copy was submitted, and return its ticket."""
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._pairs.append((ticket, begin, self._record_event()))
        return ticket

    def take(self) -> list[Span]:
        """Return the spans of copies that ended since the last call; stops at the first one still running."""
        spans = []
        while self._pairs and self._pairs[0][2].query():
            ticket, begin, end = self._pairs.popleft()
            spans.append(Span(ticket, self._host_ns(begin), self._host_ns(end)))
        return spans

    def _host_ns(self, event: Event) -> int:
        return self._anchor_ns + round(self._anchor.elapsed_time(event) * 1e6)
