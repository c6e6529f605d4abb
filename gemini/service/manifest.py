"""The service's record of its leases, from which a successor learns what living clients still hold."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import aiofiles
import msgspec

from gemini.errors import OffloadIOError

__all__ = [
    "MANIFEST_VERSION",
    "LeaseEntry",
    "Manifest",
    "ManifestWriter",
    "SharedEntry",
    "process_start",
    "read_manifest",
    "unknown_lease",
]

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1


class LeaseEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A lease of a connected client."""

    number: int
    user: int
    job: str
    rank: int
    pid: int
    """Process id; 0 if the process cannot be seen."""
    process_start: int
    """Clock ticks from the machine's start to the process's; tells it from a later process with the same id."""
    host_nbytes: int
    disk_nbytes: int
    disk_name: str


def unknown_lease(user: int, disk_name: str, disk_nbytes: int) -> LeaseEntry:
    """Return the entry of a file that is in no manifest."""
    return LeaseEntry(
        number=0,
        user=user,
        job="",
        rank=0,
        pid=0,
        process_start=0,
        host_nbytes=0,
        disk_nbytes=disk_nbytes,
        disk_name=disk_name,
    )


class SharedEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A shared chunk that clients use."""

    user: int
    key: str
    nbytes: int
    processes: list[tuple[int, int]]
    """Process id and start of each client."""

    def is_over(self) -> bool:
        """Return whether all its processes are known to have died."""
        return all(pid > 0 and process_start(pid) != start for pid, start in self.processes)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the manifest file."""

    version: int
    leases: list[LeaseEntry]
    shared: list[SharedEntry]


def process_start(pid: int) -> int:
    """Return a process's start in clock ticks since the machine's start; 0 if there is no such process.

    Source: proc_pid_stat(5), field 22; the second field, in parentheses, may contain anything.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def read_manifest(path: Path) -> Manifest | None:
    """Read the manifest of an earlier service.

    Args:
        path: path of the manifest.

    Returns:
        The manifest; None if there is none, or none that this version can read, which is logged as a warning.
    """
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning(
            "%s is not a manifest of this version (%s); leases of an earlier service are unknown", path, error
        )
        return None
    return manifest if manifest.version == MANIFEST_VERSION else None


class ManifestWriter:
    """Writes the manifest to a second file and then replaces the old one; one write serves all requests before it.

    Args:
        path: path of the manifest.
        describe: returns the current content.
    """

    def __init__(self, path: Path, describe: Callable[[], Manifest]) -> None:
        self._path = path
        self._describe = describe
        self._is_dirty = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None
        self._has_warned = False

    def changed(self) -> asyncio.Future[None]:
        """Return a future that is done when the current content has been written or could not be written."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._is_dirty.set()
        if self._task is None:
            self._task = asyncio.create_task(self._write_on())
        return done

    async def close(self) -> None:
        """Write what is still unwritten, and stop."""
        if self._task is not None:
            if self._is_dirty.is_set():
                await self.changed()
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _write_on(self) -> None:
        while True:
            await self._is_dirty.wait()
            self._is_dirty.clear()
            waiting, self._waiting = self._waiting, []
            try:
                await write_whole(self._path, msgspec.json.encode(self._describe()))
            except OSError as error:
                if not self._has_warned:
                    logger.warning("%s: a later service will not know the leases", error)
                self._has_warned = True
            for each in waiting:
                if not each.done():
                    each.set_result(None)


async def write_whole(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader finds either the old or the new content, complete.

    The file is not flushed to the drive: after a power failure there are no living clients to report.

    Args:
        path: path of the file; for a moment there is a second file beside it.
        content: the new content.

    Raises:
        OffloadIOError: the file cannot be written.
    """
    aside = path.with_name(path.name + ".new")
    try:
        async with aiofiles.open(aside, "wb", opener=_open_private) as file:
            await file.write(content)
        aside.replace(path)
    except OSError as error:
        raise OffloadIOError("write", str(aside), error.errno or 0) from error


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
