"""Times of copies on a CUDA device: events around each copy, converted to the host's clock by a common event."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from gemini.kernels.spans import MAX_SPANS, Span

__all__ = ["CudaSpans", "TimedEvent"]


class TimedEvent(Protocol):
    """The part of `torch.cuda.Event(enable_timing=True)` that this module uses."""

    def query(self) -> bool:
        """Return whether the device has reached the event."""

    def synchronize(self) -> None:
        """Block until the device has reached the event."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this event to a later one."""


class CudaSpans:
    """The spans of one device's copies. Each method is called by one thread at a time.

    Args:
        record_event: records an event with timing on the current stream, and returns it.
    """

    def __init__(self, record_event: Callable[[], TimedEvent]) -> None:
        self._anchor = record_event()
        self._anchor.synchronize()
        self._anchor_ns = time.perf_counter_ns()
        self._record_event = record_event
        self._pairs: deque[tuple[int, TimedEvent, TimedEvent]] = deque(maxlen=MAX_SPANS)
        self._next_ticket = 1

    def begin(self) -> TimedEvent:
        """Note that a copy is about to be submitted to the current stream."""
        return self._record_event()

    def end(self, begin: TimedEvent) -> int:
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

    def _host_ns(self, event: TimedEvent) -> int:
        return self._anchor_ns + round(self._anchor.elapsed_time(event) * 1e6)
