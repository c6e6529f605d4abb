"""A lock that allows one save at a time into a directory."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

from gemini.errors import OffloadIOError, naming_file

__all__ = ["DirectoryLock"]

logger = logging.getLogger(__name__)


class DirectoryLock:
    """A lock with flock(2); it ends with the process in any case.

    Args:
        path: the directory; must exist when the lock is taken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this lock is held, with or without the file system's support."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock; on a file system without locks it counts as taken.

        Raises:
            OffloadIOError: the directory cannot be opened, or another save holds its lock.
        """
        with naming_file("open", self._path):
            descriptor = os.open(self._path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            hint = "another process is saving into it: give each run its own directory"
            raise OffloadIOError("lock", str(self._path), errno.EBUSY, hint=hint) from error
        except OSError as error:  # NFS cannot lock directories, some file systems nothing
            logger.info("%s is not locked while something is saved there: %s", self._path, error)
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock; idempotent."""
        if self._descriptor is not None:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a forked child keeps a descriptor of the same lock
            os.close(self._descriptor)
            self._descriptor = None
