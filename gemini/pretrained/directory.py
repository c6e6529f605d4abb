"""Replace a directory's files by new ones that have been written aside, so that old and new are never mixed.

    DIR/.saving/    the new files, until all are on the drive

The old files are untouched until then. When the new ones are moved up, the file by which a checkpoint is recognised
goes first and comes last: whoever is killed between leaves a directory that is refused, with all new files in it or in
`.saving`, and not one with weights of both.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gemini.errors import naming_file
from gemini.pretrained.files import INDEX, SINGLE_FILE

__all__ = ["NewFiles"]

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_ENTRIES = (SINGLE_FILE, INDEX)
_KEPT = ("README.md",)
"""What the user may have written; a new one does not replace it."""


class NewFiles:
    """The files that are to replace a directory's; they are put together in `place`.

    Args:
        path: the directory; made if need be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = path / ".saving"
        self._is_moving = False

    def begin(self) -> None:
        """Make an empty place; what an earlier attempt has left behind is removed.

        Raises:
            OffloadIOError: it cannot be made.
        """
        with naming_file("create directory", self.place):
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir(parents=True)

    def abandon(self) -> None:
        """Remove what has been put together, and leave the directory as it was, unless files were moved already."""
        if not self._is_moving:
            shutil.rmtree(self.place, ignore_errors=True)

    def commit(self) -> None:
        """Replace the directory's files, once the new ones are on the drive; shards of an earlier save go too.

        Raises:
            OffloadIOError: something could not be written or moved.
        """
        with naming_file("complete", self.place):
            new = [file.relative_to(self.place) for file in sorted(self.place.rglob("*")) if file.is_file()]
            for file in new:
                _sync(self.place / file)
            self._is_moving = True
            if any(str(file) in _ENTRIES for file in new):
                self._remove_old_weights()
            for file in sorted(new, key=lambda file: str(file) in _ENTRIES):
                if str(file) in _KEPT and (self.path / file).exists():
                    continue
                (self.path / file).parent.mkdir(parents=True, exist_ok=True)
                (self.place / file).replace(self.path / file)
            shutil.rmtree(self.place)
            _sync(self.path)

    def _remove_old_weights(self) -> None:
        for name in _ENTRIES:
            (self.path / name).unlink(missing_ok=True)
        _sync(self.path)
        for file in self.path.iterdir():
            if _SHARD.fullmatch(file.name):
                file.unlink()


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
