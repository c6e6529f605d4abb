"""Recordings as files: a line that describes the run, then a line for each event.

Lines are given to the system in blocks, so a killed process loses the last block at most. When the file is read, an
incomplete last line is left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from gemini.errors import RecordingError, naming_file
from gemini.profile.description import RunDescription
from gemini.profile.events import (
    FORMAT_NAME,
    FORMAT_VERSION,
    ChunkChange,
    Event,
    Logged,
    MemorySample,
    Moment,
    Stall,
    Step,
    Work,
    decode_line,
    encode_line,
)

__all__ = ["RECORDING_NAME", "Recording", "RecordingWriter", "path_of", "read_recording"]

logger = logging.getLogger(__name__)

RECORDING_NAME = "recording"
"""Directory name of a recording in a run's directory that also has other contents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The recording of one rank. Events of a kind are in the order in which they were reported."""

    run: RunDescription
    steps: list[Step] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    chunk_changes: list[ChunkChange] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    stalls: list[Stall] = field(default_factory=list)
    samples: list[MemorySample] = field(default_factory=list)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)
    """Numbers that the training loop reported, by step."""

    def add(self, event: Event) -> None:
        """Add an event to the list of its kind."""
        if isinstance(event, Logged):
            self.logged.setdefault(event.step, {}).update(event.values)
            return
        kinds: dict[type[Event], list[Event]] = {
            Step: self.steps,  # type: ignore[dict-item]
            Moment: self.moments,  # type: ignore[dict-item]
            ChunkChange: self.chunk_changes,  # type: ignore[dict-item]
            Work: self.work,  # type: ignore[dict-item]
            Stall: self.stalls,  # type: ignore[dict-item]
            MemorySample: self.samples,  # type: ignore[dict-item]
        }
        kinds[type(event)].append(event)

    @property
    def detailed_steps(self) -> list[Step]:
        """Steps whose moves were recorded."""
        return [step for step in self.steps if step.is_detailed]

    def step(self, number: int | None = None) -> Step:
        """Return a step whose moves were recorded.

        Args:
            number: its number; None: the last one.

        Returns:
            The step.

        Raises:
            RecordingError: no step has its moves recorded.
        """
        detailed = self.detailed_steps
        found = [step for step in detailed if number in (None, step.number)]
        if not found:
            numbers = ", ".join(str(step.number) for step in detailed) or "no step"
            wanted = "any step" if number is None else f"step {number}"
            raise RecordingError(
                f"the details of {wanted} were not recorded, only those of {numbers}: name the steps to record in "
                "engine.record(steps=...)"
            )
        return found[-1]


def path_of(directory: Path, rank: int) -> Path:
    """Return the file of one rank in a run's directory."""
    return directory / f"rank{rank}.jsonl"


class RecordingWriter:
    """Writes a recording; a context manager.

    Args:
        directory: made if it is missing; a recording of the same rank in it is replaced.
        run: description of the run.

    Raises:
        OffloadIOError: the file cannot be made.
    """

    def __init__(self, directory: Path, run: RunDescription) -> None:
        self._has_failed = False
        path = path_of(directory, run.rank)
        with naming_file("write", path):
            directory.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
            header = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **run.to_json()}
            self._file.write(json.dumps(header) + "\n")
            self._file.flush()

    def write(self, events: Iterable[Event]) -> None:
        """Append events and give them to the system; if that fails, warn once and write no more. Training continues."""
        if self._has_failed:
            return
        try:
            self._file.writelines(map(encode_line, events))
            self._file.flush()
        except OSError as error:
            self._has_failed = True
            logger.warning("recording to %s has ended, and training goes on: %s", self._file.name, error)

    def close(self) -> None:
        """Close the file. Idempotent."""
        with suppress(OSError):  # `write` has already reported it
            self._file.close()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_recording(directory: Path, *, rank: int = 0) -> Recording:
    """Read what has been recorded of a run, which may still be running or have been killed.

    Args:
        directory: the directory given to `engine.record`, or `output.path` of a training file; or a rank's own file.
        rank: the rank whose recording is read.

    Returns:
        The recording; events of unknown kinds and an incomplete last line are left out.

    Raises:
        RecordingError: there is no recording, it has a later version, or a line is damaged.
    """
    path = path_of(directory, rank)
    if not path.exists() and (directory / RECORDING_NAME).is_dir():  # `python -m gemini train` wrote it there
        path = path_of(directory / RECORDING_NAME, rank)
    elif directory.is_file():
        path = directory
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise RecordingError(
            f"no recording in {directory}: expected {path.name}, which engine.record writes: {error.strerror}"
        ) from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    recording = Recording(run=_read_header(path, lines[0] if lines else ""))
    for number, line in enumerate(lines[1:], start=2):
        try:
            event = decode_line(line)
        except RecordingError as error:
            raise RecordingError(f"{path}, line {number}: {error}") from error
        if event is not None and not _is_of_run(event, recording.run):
            raise RecordingError(f"{path}, line {number}: it names a chunk or unit that the run does not have")
        if event is not None:
            recording.add(event)
    return recording


def _is_of_run(event: Event, run: RunDescription) -> bool:
    """Return whether the chunk and the unit that an event is about, if it is about any, are among the run's."""
    chunk_id, unit_id = getattr(event, "chunk_id", None), getattr(event, "unit_id", None)
    has_chunk = chunk_id is None or 0 <= chunk_id < len(run.chunks)
    return has_chunk and (unit_id is None or 0 <= unit_id < len(run.units))


def _read_header(path: Path, line: str) -> RunDescription:
    try:
        header = json.loads(line)
        found = (header.get("format"), header.get("version"))
    except (ValueError, AttributeError) as error:
        raise RecordingError(f"{path} is not a recording: its first line does not describe a run") from error
    if found[0] != FORMAT_NAME:
        raise RecordingError(f"{path} is not a recording: expected the format {FORMAT_NAME}, found {found[0]!r}")
    if found[1] != FORMAT_VERSION:
        raise RecordingError(
            f"{path} is a recording of version {found[1]}, and this program reads version {FORMAT_VERSION}: use the "
            "program that wrote it"
        )
    return RunDescription.from_json(header)
