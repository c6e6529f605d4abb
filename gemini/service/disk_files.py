"""The service's files on disk: one per lease, preallocated, and reachable only through descriptors."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from gemini.errors import ServiceError, naming_file

__all__ = ["DiskFiles", "lock_file"]

_NAME_PATTERN = re.compile(r"gemini-lease-(\d+)-[0-9a-f]{16}\.swap")
_LOCK_NAME = ".gemini-service.lock"


def lock_file(path: Path) -> int:
    """Lock a resource, so that only one service at a time uses it.

    Args:
        path: lock file that represents the resource; it is created and stays.

    Returns:
        A descriptor; the lock ends when it is closed or the process ends.

    Raises:
        ServiceError: another service holds the lock.
        OffloadIOError: the file cannot be opened.
    """
    with naming_file("open", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ServiceError(f"{path} is locked: another service uses it; name another path") from error
    return descriptor


class DiskFiles:
    """The files of leases in one directory, which only this service uses; a context manager.

    Args:
        directory: must exist.

    Raises:
        ServiceError: another service uses the directory.
        OffloadIOError: the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self._lock = lock_file(self.directory / _LOCK_NAME)

    def new_name(self, user: int) -> str:
        """Return a name that was never used before; it contains the owner's user id."""
        return f"gemini-lease-{user}-{secrets.token_hex(8)}.swap"

    def user_of(self, name: str) -> int | None:
        """Return the owner's user id in a file name; None if it is not one of these files."""
        match = _NAME_PATTERN.fullmatch(name)
        return int(match[1]) if match else None

    def create(self, name: str, nbytes: int) -> int:
        """Create a file and reserve its space. Blocks, for long where the file system writes zeros.

        Args:
            name: a name from `new_name`.
            nbytes: its length.

        Returns:
            A descriptor for reading and writing; its user may set O_DIRECT on it (F_SETFL).

        Raises:
            OffloadIOError: the file system refuses; no part of the file is left.
        """
        path = self.directory / name
        with naming_file("reserve", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
            except OSError:
                os.close(descriptor)
                self.remove(name)
                raise
        return descriptor

    def open(self, name: str) -> int:
        """Return another descriptor of a file, as `create` does."""
        with naming_file("open", self.directory / name):
            return os.open(self.directory / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def remove(self, name: str) -> None:
        """Remove a file; its space is freed when no process has it open. A missing file is no error."""
        with suppress(FileNotFoundError):
            (self.directory / name).unlink()

    def existing(self) -> dict[str, int]:
        """Return the lengths of the existing files by name, including those of other services."""
        return {
            entry.name: entry.stat(follow_symlinks=False).st_size
            for entry in os.scandir(self.directory)
            if _NAME_PATTERN.fullmatch(entry.name)
        }

    def close(self) -> None:
        """Release the directory for other services; the files stay."""
        os.close(self._lock)

    def __enter__(self) -> DiskFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
