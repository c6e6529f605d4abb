"""What a client of the memory service holds: leases, kept state and shared chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from gemini.errors import ServiceError
from gemini.service.channel import Answer, ConnectionLostError
from gemini.service.messages import (
    MAX_META_NBYTES,
    ClientMessage,
    FileGiven,
    KeepFile,
    LeaseGranted,
    SetMeta,
    SharedGiven,
)
from gemini.service.packets import close_all

__all__ = ["DiskLease", "KeptState", "Lease", "NodeBudget", "SharedChunk"]

logger = logging.getLogger(__name__)


class Holder(Protocol):
    """What a holding asks of the client that it belongs to; see ServiceClient."""

    def ask(self, message_of: Callable[[int], ClientMessage]) -> Answer:
        """Ask what the service answers at once."""

    def take_back(self, lease: Lease) -> bool:
        """End a lease; return whether it is for the caller to close its descriptors."""

    def release_shared(self, chunk: SharedChunk) -> None:
        """Say that a shared chunk is no longer used here, and close its descriptor."""

    def finish_filling(self, chunk: SharedChunk, digest: str) -> None:
        """Seal a chunk and say that it is filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBudget:
    """What the service has to grant, bytes."""

    host_total: int
    host_free: int
    """Shared chunks that nobody uses counted as free."""
    host_share: int
    """What max-min fairness gives this rank if its job wants all it can get; it may have to wait for it."""
    disk_total: int
    disk_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLease:
    """A file on the node's disk: its bytes from 0 to `nbytes` are the lease's, reserved, of any content."""

    path: Path
    """For messages: only the service's user can open it."""
    fd: int
    """For reading and writing, through the page cache until F_SETFL sets O_DIRECT. Closed with the lease."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """What a rank's predecessor left when it was killed."""

    lease: Lease
    """Now this client's, with its disk file."""
    fd: int
    """The kept memory file's, for reading and writing; closed with the lease."""
    nbytes: int
    meta: bytes
    """What the predecessor last gave `Lease.set_meta`."""


class Lease:
    """Host memory and disk that this client may take, until `end`. Made by `ServiceClient.lease`.

    Args:
        client: whose.
        granted: the service's words.
        descriptors: of the disk file, if there is one, and of the kept file, if there is one; closed with this.
    """

    def __init__(self, client: Holder, granted: LeaseGranted, descriptors: tuple[int, ...]) -> None:
        self.host_nbytes = granted.host_nbytes
        self.disk: DiskLease | None = None
        self.keep_fd: int | None = None
        """Of the kept memory file; None: there is none."""
        self.meta = b""
        self.number = granted.lease
        """The service's; a new service gives another one."""
        self.is_ended = False
        self._client = client
        rest = list(descriptors)
        if granted.disk_path:
            self.disk = DiskLease(path=Path(granted.disk_path), fd=rest.pop(0), nbytes=granted.disk_nbytes)
        if rest:
            self.keep_fd = rest.pop(0)

    def keep_file(self, nbytes: int) -> int:
        """Make a memory file that the service keeps for a successor when this process is killed, with the lease.

        Args:
            nbytes: its length, counted in the lease's host bytes; fixed.

        Returns:
            A descriptor for reading and writing, closed with the lease. Memory is taken as it is written.

        Raises:
            ServiceError: the rank has such a file, the lease is smaller, or the service is gone.
        """
        answer, descriptors = self._client.ask(lambda id: KeepFile(id=id, lease=self.number, nbytes=nbytes))
        assert isinstance(answer, FileGiven)
        (self.keep_fd,) = descriptors
        return self.keep_fd

    def set_meta(self, meta: bytes) -> None:
        """Keep a description beside the kept file; while no service is there, for the next one.

        Of a predecessor's shared chunks, those that this client has not asked for are given up with it.

        Args:
            meta: at most 16 KiB.

        Raises:
            ServiceError: it is longer.
        """
        if len(meta) > MAX_META_NBYTES:
            raise ServiceError(f"meta: expected at most {MAX_META_NBYTES} bytes, got {len(meta)}; use the kept file")
        self.meta = meta
        try:
            self._client.ask(lambda id: SetMeta(id=id, lease=self.number, meta=meta))
        except ConnectionLostError as error:
            logger.debug("the next service will be told: %s", error)

    def end(self) -> None:
        """Give everything back, and close the descriptors. Idempotent; nothing in a forked child."""
        if self._client.take_back(self):
            close_all(self.descriptors)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Of the disk file and the kept file, as far as there are any."""
        disk = () if self.disk is None else (self.disk.fd,)
        return disk if self.keep_fd is None else (*disk, self.keep_fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class SharedChunk:
    """Read-only bytes that all processes of a user map once, or the task of filling them; a context manager.

    Leaving the context gives up a chunk that is not filled, so that somebody else fills it; a filled one stays until
    `ServiceClient.release_shared`. Made by `ServiceClient.shared`.

    Args:
        client: whose.
        key: of the chunk.
        given: the service's words.
        fd: closed with this.
    """

    def __init__(self, client: Holder, key: str, given: SharedGiven, fd: int) -> None:
        self.key = key
        self.nbytes = given.nbytes
        self.digest = given.digest
        """Empty: not filled."""
        self.fd = fd
        """Read-only if the chunk is filled, else for the filler to map and write."""
        self.is_released = False
        self.is_own = False
        """Whether only this process has it, as a new service had another one of its key already."""
        self._client = client

    @property
    def is_filled(self) -> bool:
        """Whether the bytes are there, for good."""
        return bool(self.digest)

    def fill_done(self, digest: str) -> None:
        """Seal what has been written, and give it to all who wait; `fd` is then another one, read-only.

        Args:
            digest: of the content, at most 128 printable characters. If the user has a chunk of it already, under
                another key, that one is used and this one dropped.

        Raises:
            ServiceError: it is mapped for writing still; unmap it first.
        """
        self._client.finish_filling(self, digest)

    def __enter__(self) -> SharedChunk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.is_filled:
            self._client.release_shared(self)
