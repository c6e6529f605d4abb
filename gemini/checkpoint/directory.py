"""A directory of checkpoints: each has its own directory, which gets its name when it is complete.

    DIR/step-00000300-save-00001/     complete
    DIR/step-00000400-save-00002/
    DIR/.saving/                      being written, or left behind by a process that was killed
    DIR/.removing-step-...            an old one that was being removed when the process was killed

They are numbered in the order of saving, so a run that went back to an earlier step resumes where it was last.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from gemini.checkpoint.manifest import Manifest
from gemini.errors import CheckpointError, ConfigError, MissingCheckpointError, naming_file
from gemini.files.durable import StagedDirectory, write_durably

__all__ = [
    "CheckpointDirectory",
    "complete_checkpoints",
    "find_checkpoint",
    "has_checkpoint",
    "name_of",
    "read_manifest",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-\d+-save-(\d+)")


class CheckpointDirectory:
    """The checkpoints of one training run.

    The directory is locked while a checkpoint is being saved.

    Args:
        path: created with the first checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()  # whatever the working directory is when the checkpoint is complete
        self._staged = StagedDirectory(path, ".saving")

    @property
    def place(self) -> Path:
        """Directory in which a checkpoint is assembled."""
        return self._staged.place

    def begin(self) -> None:
        """Lock the directory and make an empty one inside; what earlier attempts have left is removed.

        Raises:
            OffloadIOError: it cannot be made, or another process is saving into it.
            ConfigError: it is a checkpoint itself.
        """
        with naming_file("create directory", self.path):
            if (self.path / MANIFEST).exists():
                raise ConfigError(f"save_checkpoint: {self.path} is a checkpoint: expected a directory of checkpoints")
        self._staged.begin(self._clear_up)

    def _clear_up(self) -> None:
        """Remove old checkpoints that were being removed when a process was killed."""
        with naming_file("create directory", self.place):
            for left in self.path.glob(".removing-*"):
                shutil.rmtree(left, ignore_errors=True)

    def abandon(self) -> None:
        """Remove what has been written since `begin`, if anything."""
        self._staged.abandon()

    def publish(self, manifest: Manifest, *, keep_last: int | None) -> int:
        """Publish a checkpoint whose files are all on the drive; then remove the oldest checkpoints.

        Renaming the directory is the atomic moment: before it there is no new checkpoint, after it a whole one.

        Args:
            manifest: the content of the checkpoint.
            keep_last: complete checkpoints to keep; None: all.

        Returns:
            Its number.

        Raises:
            OffloadIOError: it cannot be completed.
            CheckpointError: a rank has written its files elsewhere.
        """
        fault = _find_fault(self.place, manifest)
        if fault is not None:
            raise CheckpointError(f"{fault}; give all ranks the same shared directory")
        with naming_file("complete checkpoint", self.place):
            write_durably(self.place / MANIFEST, manifest.to_json().encode())
            number = max(map(_number_of, self.path.iterdir()), default=0) + 1  # incomplete ones stand in the way, too
            self._staged.publish(self.path / name_of(manifest.step, number))
        if keep_last is not None:
            self._remove(complete_checkpoints(self.path)[:-keep_last])
        self._staged.release()
        return number

    def _remove(self, checkpoints: list[Path]) -> None:
        for path in checkpoints:
            doomed = path.with_name(f".removing-{path.name}")  # one that is half removed must not look complete
            try:
                path.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", path, error)


def name_of(step: int, number: int) -> str:
    """Return the name of a complete checkpoint's directory."""
    return f"step-{step:08d}-save-{number:05d}"


def _number_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match is not None else 0


def complete_checkpoints(path: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, in the order in which they were saved."""
    with naming_file("read", path):
        found = [entry for entry in path.iterdir() if _number_of(entry) and (entry / MANIFEST).is_file()]
    return sorted(found, key=_number_of)


def find_checkpoint(path: Path) -> Path:
    """Find a checkpoint's own directory.

    Args:
        path: the checkpoint's directory, or a directory of checkpoints.

    Returns:
        `path` itself, or the complete checkpoint in it that was saved last.

    Raises:
        MissingCheckpointError: there is none.
        OffloadIOError: the directory cannot be read.
    """
    with naming_file("read", path):
        found = complete_checkpoints(path) if path.is_dir() else []
        if not found and (path / MANIFEST).is_file():
            return path
    if not found:
        raise MissingCheckpointError(
            f"{path}: no complete checkpoint here; expected a directory that engine.save_checkpoint was given, or one "
            "of the step-... directories in it"
        )
    return found[-1]


def has_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Return whether `GeminiDDP.load_checkpoint(path)` would find a complete checkpoint.

    Args:
        path: as for `load_checkpoint`.

    Returns:
        False if there is no such directory, or nothing complete in it.

    Raises:
        OffloadIOError: the directory cannot be read.
    """
    try:
        find_checkpoint(Path(path))
    except CheckpointError:
        return False
    return True


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest, and check that all its files exist in full length.

    Args:
        path: from `find_checkpoint`.

    Returns:
        The manifest.

    Raises:
        CheckpointError: the manifest or a file is damaged or missing.
        OffloadIOError: the manifest cannot be read.
    """
    with naming_file("read", path / MANIFEST):
        text = (path / MANIFEST).read_text(encoding="utf-8", errors="replace")
    manifest = Manifest.from_json(text, source=str(path / MANIFEST))
    fault = _find_fault(path, manifest)
    if fault is not None:
        raise CheckpointError(f"{fault}; take another checkpoint")
    return manifest


def _find_fault(path: Path, manifest: Manifest) -> str | None:
    """Return which file of a checkpoint is not there in full length, None if all are."""
    for name, record in manifest.files.items():
        try:
            nbytes = (path / name).stat().st_size
        except OSError:
            return f"{path / name} is missing from the checkpoint"
        if nbytes != record.nbytes:
            return f"{path / name} is damaged: expected {record.nbytes} bytes, found {nbytes}"
    return None
