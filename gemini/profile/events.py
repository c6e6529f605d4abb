"""The events of a recording, and the lines of text that they are written as.

All times are nanoseconds of one clock, time.perf_counter_ns of the process that was recorded.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, get_type_hints

from gemini.errors import RecordingError
from gemini.profile.typed import fits

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "ChunkChange",
    "Event",
    "Logged",
    "MemorySample",
    "Moment",
    "Stall",
    "Step",
    "Work",
    "decode_line",
    "encode_line",
]

FORMAT_NAME = "gemini-recording"
FORMAT_VERSION = 1


class Step(NamedTuple):
    """A completed optimizer step and its cost; every step has one."""

    number: int
    """Number of steps since the recording began, from 0."""
    begin_ns: int
    """Start of forward."""
    end_ns: int
    """End of the optimizer's step."""
    is_detailed: bool
    """Whether its moves were recorded."""
    weights_stall_s: float
    """Seconds that forward and backward waited for weights since the previous step."""
    update_stall_s: float
    """Seconds that training waited for updates since the previous step."""
    num_fetches: int
    num_misses: int
    """Number of fetches that started only when the weights were needed."""
    fetched_nbytes: int
    nvme_read_nbytes: int
    nvme_written_nbytes: int


class Moment(NamedTuple):
    """A unit is entered or left, backward reaches a unit, or the step's updates begin."""

    at_ns: int
    kind: str
    """Kind: "enter", "leave", "backward" or "update"."""
    unit_id: int | None
    """Unit id, 0 for the model itself; None for a moment of no unit."""


class ChunkChange(NamedTuple):
    """A chunk enters a state."""

    at_ns: int
    chunk_id: int
    state: str
    """Value of a ChunkState."""


class Work(NamedTuple):
    """A completed native job or transfer."""

    operation: str
    """Operation: "read", "write", "upload", "download", "copy", "gradient" or "adam update"."""
    what: str
    """Content: "weights", "state", "gradients", "activations" or ""."""
    chunk_id: int | None
    begin_ns: int
    end_ns: int
    nbytes: int


class Stall(NamedTuple):
    """The training thread waits."""

    reason: str
    """Reason: "weights" or "update"."""
    chunk_id: int
    begin_ns: int
    end_ns: int


class MemorySample(NamedTuple):
    """Bytes that a tier holds from a given time on."""

    at_ns: int
    tier: str
    held_nbytes: dict[str, int]
    """The engine's bytes by purpose."""
    other_nbytes: int | None
    """Visible bytes of other owners, in compute memory those of torch's tensors; None if not known."""


class Logged(NamedTuple):
    """Numbers that the training loop reports for a step."""

    step: int
    values: dict[str, float]


Event = Step | Moment | ChunkChange | Work | Stall | MemorySample | Logged

_KINDS: dict[str, type[Any]] = {
    "step": Step,
    "moment": Moment,
    "chunk": ChunkChange,
    "work": Work,
    "stall": Stall,
    "memory": MemorySample,
    "log": Logged,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_HINTS = {kind: tuple(get_type_hints(kind).values()) for kind in _KINDS.values()}


def encode_line(event: Event) -> str:
    """Return an event as one line of JSON: a list of its kind's name and its fields."""
    return json.dumps([_NAMES[type(event)], *event], separators=(",", ":")) + "\n"


def decode_line(line: str) -> Event | None:
    """Read what `encode_line` wrote.

    Args:
        line: the line.

    Returns:
        The event; None if this version does not know its kind.

    Raises:
        RecordingError: the line is not an event.
    """
    try:
        name, *fields = json.loads(line)
        kind = _KINDS.get(name)
        event: Event | None = None if kind is None else kind(*fields)
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordingError(f"expected an event as a list of its kind and fields, got {line[:80]!r}") from error
    if event is not None and not _is_sound(event):
        raise RecordingError(f"expected an event as a list of its kind and fields, got {line[:80]!r}")
    return event


def _is_sound(event: Event) -> bool:
    """Return whether an event's fields are of their types, and its times in their order."""
    hints = _HINTS[type(event)]
    if not all(fits(value, hint) for value, hint in zip(event, hints, strict=True)):
        return False
    return not isinstance(event, (Step, Work, Stall)) or event.begin_ns <= event.end_ns
