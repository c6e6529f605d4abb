"""Where checkpoints are kept: each in a directory of its own, which appears under its name when it is complete.

    DIR/step-00000300-save-00001/          complete
    DIR/step-00000400-save-00002/
    DIR/.saving-step-00000500-save-00003/  being written, or left behind by a process that was killed

They are numbered as they were saved, so that a run that went back to an earlier step goes on from where it was last.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gemini.checkpoint.manifest import Manifest
from gemini.errors import CheckpointError, OffloadIOError

__all__ = [
    "CheckpointDirectory",
    "complete_checkpoints",
    "find_checkpoint",
    "name_of",
    "read_manifest",
    "write_durably",
]

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d+-save-(\d+)")


class CheckpointDirectory:
    """The checkpoints of one training run; used by one process at a time.

    Args:
        path: made if need be.

    Raises:
        OffloadIOError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OffloadIOError("create directory", str(path), error.errno or 0) from error

    def next_number(self) -> int:
        """Return the number of the next checkpoint."""
        return max((_number_of(path) for path in complete_checkpoints(self.path)), default=0) + 1

    def begin(self, name: str) -> None:
        """Make an empty place for a checkpoint; what earlier attempts have left behind is removed.

        Args:
            name: from `name_of`.

        Raises:
            OffloadIOError: it cannot be made.
        """
        for left in self.path.glob(".saving-*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            self.place_of(name).mkdir()
        except OSError as error:
            raise OffloadIOError("create directory", str(self.place_of(name)), error.errno or 0) from error

    def place_of(self, name: str) -> Path:
        """Return where a checkpoint is put together."""
        return self.path / f".saving-{name}"

    def abandon(self, name: str) -> None:
        """Remove a checkpoint that will not be completed."""
        shutil.rmtree(self.place_of(name), ignore_errors=True)

    def commit(self, name: str, manifest: Manifest, *, keep_last: int | None) -> None:
        """Let a checkpoint count, all of whose files are on the drive; then remove the oldest ones.

        Args:
            name: its own.
            manifest: what it consists of.
            keep_last: complete checkpoints to keep; None: all.

        Raises:
            OffloadIOError: it cannot be completed.
        """
        place = self.place_of(name)
        try:
            write_durably(place / MANIFEST, manifest.to_json().encode())
            _sync(place)
            place.rename(self.path / name)
            _sync(self.path)
            for old in complete_checkpoints(self.path)[:-keep_last] if keep_last is not None else ():
                # Under another name first: a checkpoint half removed must not look like one.
                doomed = old.with_name(f".saving-old-{old.name}")
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        except OSError as error:
            raise OffloadIOError("complete checkpoint", str(place), error.errno or 0) from error


def name_of(step: int, number: int) -> str:
    """Return the name of a checkpoint's directory."""
    return f"step-{step:08d}-save-{number:05d}"


def _number_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else 0


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the drive.

    Args:
        path: must not exist.
        data: all of it.

    Raises:
        OffloadIOError: it cannot be written.
    """
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OffloadIOError("write", str(path), error.errno or 0) from error


def complete_checkpoints(path: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, in the order in which they were saved."""
    found = [entry for entry in path.iterdir() if _number_of(entry) and (entry / MANIFEST).is_file()]
    return sorted(found, key=_number_of)


def find_checkpoint(path: Path) -> Path:
    """Find a checkpoint's own directory.

    Args:
        path: that, or a directory of checkpoints.

    Returns:
        `path` itself, or the complete checkpoint in it that was saved last.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    found = complete_checkpoints(path) if path.is_dir() else []
    if not found:
        raise CheckpointError(
            f"{path}: no complete checkpoint here; expected a directory that engine.save_checkpoint was given, or one "
            "of the step-... directories in it"
        )
    return found[-1]


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest, and make sure that all its files are there in full length.

    Args:
        path: from `find_checkpoint`.

    Returns:
        The manifest.

    Raises:
        CheckpointError: the manifest or a file is damaged or missing.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OffloadIOError("read", str(path / MANIFEST), error.errno or 0) from error
    manifest = Manifest.from_json(text, source=str(path / MANIFEST))
    for name, record in manifest.files.items():
        try:
            nbytes = (path / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{path / name} is missing from the checkpoint; take another one") from None
        if nbytes != record.nbytes:
            raise CheckpointError(
                f"{path / name} is damaged: expected {record.nbytes} bytes, found {nbytes}; take another checkpoint"
            )
    return manifest


def _sync(directory: Path) -> None:
    """Wait until a directory's entries are on the drive."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
