"""Files and directories that are on the drive when a function returns, and come into being all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from gemini.errors import OffloadIOError, naming_file
from gemini.files.directory_lock import DirectoryLock

__all__ = ["StagedDirectory", "sync", "write_durably"]


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the drive.

    Args:
        path: must not exist.
        data: all of it.

    Raises:
        OffloadIOError: it cannot be written.
    """
    with naming_file("write", path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the drive.

    Args:
        path: the file or directory.

    Raises:
        OSError: they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StagedDirectory:
    """A directory that is assembled inside another one, which is locked meanwhile, and then gets its name there.

    Args:
        parent: the other directory; made if need be.
        name: of this one until it gets its own.
    """

    def __init__(self, parent: Path, name: str) -> None:
        self.parent = parent
        self.place = parent / name
        """Path of the directory until it gets its name."""
        self._lock = DirectoryLock(parent)

    def begin(self, clear_up: Callable[[], None]) -> None:
        """Lock the parent and make an empty place; what was left there by a process that was killed is removed.

        Args:
            clear_up: sees to what else was left in the parent; called when that is locked.

        Raises:
            OffloadIOError: the place cannot be made, or another process is saving into the parent.
        """
        with naming_file("create directory", self.parent):
            self.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            clear_up()
            with naming_file("create directory", self.place):
                shutil.rmtree(self.place, ignore_errors=True)
                self.place.mkdir()
        except OffloadIOError:
            self._lock.release()
            raise

    def abandon(self) -> None:
        """Remove what has been written since `begin` and has no name yet, if anything, and release the lock."""
        if self._lock.is_held:
            shutil.rmtree(self.place, ignore_errors=True)
            self._lock.release()

    def publish(self, path: Path) -> None:
        """Give the directory its name, atomically, once its entries are on the drive; the parent stays locked.

        Args:
            path: in the parent; must not exist.

        Raises:
            OSError: it cannot be renamed, or the drive fails.
        """
        sync(self.place)
        self.place.rename(path)
        sync(self.parent)

    def release(self) -> None:
        """Release the lock, so that others can save into the parent. Idempotent."""
        self._lock.release()
