"""The causes of waits: every wait is divided among the operations on its chunk during the wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gemini.profile.events import ChunkChange, Stall, Step, Work
from gemini.profile.recording import Recording

__all__ = ["ExplainedStall", "explain_stall", "seconds_by_cause", "stalls_of_step"]

QUEUED = "others first"
"""Cause: the chunk's own work waited for work of other chunks."""
IDLE = "nothing under way"
"""Cause: no recorded work for any chunk, only bookkeeping or unrecorded work."""
_PRIORITY = ("read", "upload", "copy", "adam update", "gradient", "write", "download")
"""Operations by precedence, where several run on one chunk at once: the first stage counts, the rest wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedStall:
    """A wait and its causes."""

    stall: Stall
    was_late: bool
    """Whether the fetch began only when the weights were needed."""
    spent_ns: dict[str, int]
    """Nanoseconds by cause, longest first; they add up to the wait."""

    @property
    def seconds(self) -> float:
        """Length of the wait."""
        return (self.stall.end_ns - self.stall.begin_ns) / 1e9

    @property
    def cause(self) -> str:
        """Cause of the largest part."""
        return next(iter(self.spent_ns), IDLE)


def stalls_of_step(recording: Recording, step: Step) -> list[ExplainedStall]:
    """Explain the waits that began in a step.

    Args:
        recording: the rank's recording.
        step: a step with details.

    Returns:
        The waits in order, without those too short for the clock.
    """
    return [
        explain_stall(stall, recording.work, recording.chunk_changes)
        for stall in recording.stalls
        if step.begin_ns <= stall.begin_ns <= step.end_ns and stall.begin_ns < stall.end_ns
    ]


def explain_stall(stall: Stall, work: Sequence[Work], changes: Sequence[ChunkChange]) -> ExplainedStall:
    """Divide a wait among its causes.

    At each time the cause is the operation on the awaited chunk, the earliest stage if there are several; else work for
    other chunks; else nothing.

    Args:
        stall: the wait.
        work: all recorded work.
        changes: changes of all chunks.

    Returns:
        The wait with its causes.
    """
    meanwhile = [each for each in work if each.begin_ns < stall.end_ns and each.end_ns > stall.begin_ns]
    cuts = sorted(
        {min(max(at_ns, stall.begin_ns), stall.end_ns) for each in meanwhile for at_ns in (each.begin_ns, each.end_ns)}
        | {stall.begin_ns, stall.end_ns}
    )
    spent: dict[str, int] = {}
    for begin_ns, end_ns in pairwise(cuts):
        cause = _cause(stall, [w for w in meanwhile if w.begin_ns <= begin_ns and w.end_ns >= end_ns])
        spent[cause] = spent.get(cause, 0) + end_ns - begin_ns
    was_late = stall.reason == "weights" and any(
        change.chunk_id == stall.chunk_id
        and change.state == "fetching"
        and stall.begin_ns <= change.at_ns <= stall.end_ns
        for change in changes
    )
    longest_first = sorted(spent.items(), key=lambda item: -item[1])
    return ExplainedStall(stall=stall, was_late=was_late, spent_ns=dict(longest_first))


def _cause(stall: Stall, running: Sequence[Work]) -> str:
    """Return the cause of a wait while some work ran; a wait for weights never counts work on state."""
    own = [
        work
        for work in running
        if work.chunk_id == stall.chunk_id and (stall.reason != "weights" or work.what == "weights")
    ]
    if own:
        first = min(
            own, key=lambda work: _PRIORITY.index(work.operation) if work.operation in _PRIORITY else len(_PRIORITY)
        )
        return f"{first.operation} {first.what}".strip()
    return QUEUED if running else IDLE


def seconds_by_cause(stalls: Iterable[ExplainedStall]) -> dict[str, float]:
    """Return how long was waited for each cause, longest first."""
    spent: dict[str, int] = {}
    for stall in stalls:
        for cause, nanoseconds in stall.spent_ns.items():
            name = f"{stall.stall.reason}: {cause}"
            spent[name] = spent.get(name, 0) + nanoseconds
    return {cause: ns / 1e9 for cause, ns in sorted(spent.items(), key=lambda item: -item[1])}
