"""When native jobs and requests ran: who is told of them, and how their times come back.

Times are nanoseconds of time.perf_counter_ns, which on Linux is the native clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from gemini._native import ffi

__all__ = ["MAX_SPANS", "Span", "SpanRecorder", "SpanSource", "read_spans"]

MAX_SPANS = 1 << 16
"""Spans that may wait to be taken: 1.5 MiB."""


class Span(NamedTuple):
    """From the moment a thread, or the kernel, was given the first part of something to its completion."""

    ticket: int
    begin_ns: int
    end_ns: int


class SpanSource(Protocol):
    """What runs jobs or requests and keeps their spans."""

    def record_to(self, recorder: SpanRecorder | None) -> None:
        """Tell a recorder of everything that is submitted from now on; None: no longer."""

    def take_spans(self) -> list[Span]:
        """Return the spans of what has completed since the last call, in order of completion."""


class SpanRecorder(Protocol):
    """Who is told of what is submitted."""

    def submitted(self, source: SpanSource, ticket: int, *, operation: str, record: str, nbytes: int) -> None:
        """Note a job or request, in the thread that submits it; its span comes from the source.

        Args:
            source: who runs it.
            ticket: its number there.
            operation: what is done: "read", "write", "copy", "upload", "download", "gradient" or "adam update".
            record: to what: "state of chunk 3 (...)"; "" where nobody said.
            nbytes: bytes moved; for an update those of the weights, for a gradient those that arrive.
        """


def read_spans(take: Callable[[Any, int], int]) -> list[Span]:
    """Take everything that waits.

    Args:
        take: fills a gn_span array of a given length and returns how many, or -errno.

    Returns:
        The spans; none where there is no native object any more.
    """
    count = 1024
    spans: list[Span] = []
    native = ffi.new("gn_span[]", count)
    while (num_taken := take(native, count)) > 0:
        spans += [Span(each.ticket, each.begin_ns, each.end_ns) for each in native[0:num_taken]]
    return spans
