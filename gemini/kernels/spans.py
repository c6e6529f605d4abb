"""Times of native jobs and requests: their report to a recorder, and how the times are read.

Times are nanoseconds of time.perf_counter_ns, which on Linux is the native clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from gemini._native import ffi

__all__ = ["MAX_SPANS", "Span", "SpanRecorder", "SpanSource", "read_spans"]

MAX_SPANS = 1 << 16
"""Maximum number of spans that wait to be taken: 1.5 MiB."""


class Span(NamedTuple):
    """Time from the start of the first part, in a thread or in the kernel, to completion."""

    ticket: int
    begin_ns: int
    end_ns: int


class SpanSource(Protocol):
    """An object that runs jobs or requests and keeps their spans."""

    def record_to(self, recorder: SpanRecorder | None) -> None:
        """Report every submission to a recorder from now on; None: stop."""

    def take_spans(self) -> list[Span]:
        """Return the spans of jobs that completed since the last call, in order of completion."""


class SpanRecorder(Protocol):
    """The receiver of submitted jobs and requests."""

    def submitted(self, source: SpanSource, ticket: int, *, operation: str, record: str, nbytes: int) -> None:
        """Note a job or request, in the thread that submits it; its span comes from the source.

        Args:
            source: the object that runs it.
            ticket: its number there.
            operation: its name: "read", "write", "copy", "upload", "download", "gradient" or "adam update".
            record: name of its object: "state of chunk 3 (...)"; "" if none was given.
            nbytes: bytes moved; for an update the weights' bytes, for a gradient the arriving bytes.
        """


def read_spans(take: Callable[[Any, int], int]) -> list[Span]:
    """Take all waiting spans.

    Args:
        take: fills a gn_span array of a given length and returns the number of spans, or -errno.

    Returns:
        The spans; none if the native object no longer exists.
    """
    count = 1024
    spans: list[Span] = []
    native = ffi.new("gn_span[]", count)
    while (num_taken := take(native, count)) > 0:
        spans += [Span(each.ticket, each.begin_ns, each.end_ns) for each in native[0:num_taken]]
    return spans
