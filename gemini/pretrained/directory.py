"""Replaces a directory's files by new ones that were written elsewhere, so that old and new are never mixed.

    DIR/.saving/    the new files, until all are on the drive; useless if the process was killed before that DIR/.saved/
    the new files, all on the drive, while they are moved up

The old files are untouched until all new ones are there. When these are moved up, the files that identify a checkpoint
are removed first and added last. So a process that is killed in between leaves a directory that is refused, with the
remaining new files in `.saved`, and not one with weights of both. The next save moves them up before it begins.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from gemini.errors import naming_file
from gemini.files.durable import StagedDirectory, sync
from gemini.pretrained.files import ADAPTER_FILE, INDEX, SAVED, SAVING, SINGLE_FILE

__all__ = ["NewFiles"]

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_ENTRIES = (SINGLE_FILE, INDEX)
_KEPT = ("README.md",)
"""Files that the user may have written; a new one does not replace an existing one."""


class NewFiles:
    """The files that will replace a directory's; they are collected in `place`.

    Args:
        path: the directory; made if needed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staged = StagedDirectory(path, SAVING)
        self._complete = path / SAVED

    @property
    def place(self) -> Path:
        """Directory in which the new files are assembled."""
        return self._staged.place

    def begin(self) -> None:
        """Lock the directory and make an empty place; leftovers of a killed process are cleared.

        Raises:
            OffloadIOError: the directory cannot be made, or another process saves into it.
        """
        self._staged.begin(self._clear_up)

    def _clear_up(self) -> None:
        """Move files up that were complete when a process was killed."""
        with naming_file("complete", self._complete):
            if self._complete.is_dir():
                self._move_up()

    def abandon(self) -> None:
        """Remove what has been collected since `begin`; complete files stay."""
        self._staged.abandon()

    def commit(self) -> None:
        """Replace the directory's files once the new ones are on the drive; shards of an earlier save are removed.

        Raises:
            OffloadIOError: a file could not be written or moved.
        """
        with naming_file("complete", self.place):
            for file in sorted(self.place.rglob("*"), reverse=True):  # a directory's contents before the directory
                sync(file)
            self._staged.publish(self._complete)
        with naming_file("complete", self._complete):
            self._move_up()
        self._staged.release()

    def _move_up(self) -> None:
        """Move complete files into the directory, continuing where a killed process stopped."""
        new = sorted(file.relative_to(self._complete) for file in self._complete.rglob("*") if file.is_file())
        entries = [file for file in new if file.name in (*_ENTRIES, ADAPTER_FILE)]
        old = {self.path / file for file in entries}
        if any(str(file) in _ENTRIES for file in entries):
            old |= {self.path / name for name in _ENTRIES}
        for file in old:
            file.unlink(missing_ok=True)
        sync(self.path)
        for file in _stale_shards(self.path, self._complete):
            file.unlink()
        self._move([file for file in new if file not in entries])
        self._move(entries)
        shutil.rmtree(self._complete)

    def _move(self, files: list[Path]) -> None:
        for file in files:
            target = self.path / file
            if str(file) not in _KEPT or not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                (self._complete / file).replace(target)
        for parent in {self.path, *((self.path / file).parent for file in files)}:
            sync(parent)


def _stale_shards(path: Path, complete: Path) -> list[Path]:
    """Return a directory's shards that are not of the model whose index, or only file, is about to be moved there."""
    if not any((complete / name).is_file() for name in _ENTRIES):
        return []
    new: set[str] = set()
    if (complete / INDEX).is_file():
        new.update(json.loads((complete / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return [file for file in path.iterdir() if _SHARD.fullmatch(file.name) and file.name not in new]
