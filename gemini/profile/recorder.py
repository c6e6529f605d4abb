"""Records events from several threads in bounded memory.

The code that acts reports its events here; without a recording it holds None and makes one test. Native jobs and
transfers are reported when they are submitted and keep their times themselves; `flush` joins the two.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from gemini.errors import GeminiError
from gemini.kernels.spans import Span, SpanSource
from gemini.profile.events import ChunkChange, Event, Logged, MemorySample, Moment, Stall, Work
from gemini.profile.recording import RecordingWriter

__all__ = ["Recorder"]

MAX_WAITING = 4096
"""Maximum number of events that wait in memory to be written, and of running jobs whose spans are not fetched."""

MAX_UNMATCHED = 64
"""Maximum number of spans of unreported jobs: a thread is about to report them, or they began before the recording."""

_RECORD = re.compile(r"(?:(weights|state|gradients) of )?chunk (\d+)\b")


class _Submitted(NamedTuple):
    operation: str
    record: str
    nbytes: int


class Recorder:
    """One rank's recorder.

    Args:
        writer: the recording's writer; closed with this.
        sample_memory: returns what every tier holds now.
    """

    def __init__(self, writer: RecordingWriter, sample_memory: Callable[[], Iterable[MemorySample]]) -> None:
        self._writer = writer
        self._sample_memory = sample_memory
        self._events: deque[Event] = deque()
        self._submitted: dict[tuple[int, int], _Submitted] = {}
        self._sources: dict[int, SpanSource] = {}
        self._unmatched: list[tuple[int, Span]] = []  # the submitting thread may be about to report it
        self._held: dict[str, MemorySample] = {}
        self._lock = threading.Lock()  # flush runs under it; deques and dicts need no lock

    # ---------------------------------------------------------------- told by those who act

    def submitted(self, source: SpanSource, ticket: int, *, operation: str, record: str, nbytes: int) -> None:
        """Note a native job or transfer; see gemini.kernels.spans.SpanRecorder."""
        if nbytes:  # else there will be no span
            self._submitted[id(source), ticket] = _Submitted(operation, record, nbytes)
        if len(self._submitted) >= MAX_WAITING:
            self.flush()

    def chunk_became(self, chunk_id: int, state: str) -> None:
        """Record that a chunk enters a state."""
        self._events.append(ChunkChange(time.perf_counter_ns(), chunk_id, state))

    def stalled(self, reason: str, chunk_id: int, begin_s: float, end_s: float) -> None:
        """Record that the training thread waited; times are those of time.perf_counter."""
        self._events.append(Stall(reason, chunk_id, round(begin_s * 1e9), round(end_s * 1e9)))

    def moment(self, kind: str, unit_id: int | None) -> None:
        """Record a moment, and what every tier holds then."""
        self._events.append(Moment(time.perf_counter_ns(), kind, unit_id))
        for sample in self._sample_memory():
            held = self._held.get(sample.tier)
            if held is None or held[2:] != sample[2:]:
                self._held[sample.tier] = sample
                self._events.append(sample)
        if len(self._events) >= MAX_WAITING:
            self.flush()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record numbers that the training loop reports for a step."""
        self.add(Logged(step, values))

    def add(self, event: Event) -> None:
        """Record an event, and write all events."""
        self._events.append(event)
        self.flush()

    # ---------------------------------------------------------------- life

    def attach(self, sources: Iterable[SpanSource]) -> None:
        """Receive all jobs and transfers from now on."""
        self._held.clear()
        for source in sources:
            self._sources[id(source)] = source
            source.record_to(self)

    def detach(self) -> None:
        """Receive no further jobs; the times of running ones are lost."""
        self.flush()
        for source in self._sources.values():
            with suppress(GeminiError):
                source.record_to(None)
        for waiting in (self._sources, self._submitted, self._unmatched):
            waiting.clear()

    def flush(self) -> None:
        """Write everything that is known so far."""
        with self._lock:
            self._match_spans()
            events = [self._events.popleft() for _ in range(len(self._events))]
            self._writer.write(events)

    def close(self) -> None:
        """Write what is left and close the file."""
        self.detach()
        self._writer.close()

    def _match_spans(self) -> None:
        for key, source in self._sources.items():
            with suppress(GeminiError):  # the engine is closed, so no job runs there any more
                self._unmatched += [(key, span) for span in source.take_spans()]
        unmatched, self._unmatched = self._unmatched, []
        for key, span in unmatched:
            job = self._submitted.pop((key, span.ticket), None)
            if job is None:
                self._unmatched.append((key, span))
            else:
                what, chunk_id = _parse(job.record)
                self._events.append(Work(job.operation, what, chunk_id, span.begin_ns, span.end_ns, job.nbytes))
        del self._unmatched[:-MAX_UNMATCHED]


def _parse(record: str) -> tuple[str, int | None]:
    """Split a record's name into its content and its chunk."""
    match = _RECORD.match(record)
    return (record, None) if match is None else (match[1] or "", int(match[2]))
