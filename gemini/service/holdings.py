"""Objects that a client of the memory service holds: leases, kept state and shared chunks."""

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
    """The part of a client that its leases and chunks use; see ServiceClient."""

    def ask(self, message_of: Callable[[int], ClientMessage]) -> Answer:
        """Send a message that the service answers at once, and return the answer."""

    def take_back(self, lease: Lease) -> bool:
        """End a lease; return whether the caller must close its descriptors."""

    def release_shared(self, chunk: SharedChunk) -> None:
        """Report that a shared chunk is no longer used here, and close its descriptor."""

    def finish_filling(self, chunk: SharedChunk, digest: str) -> None:
        """Seal a chunk and report that it is filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeBudget:
    """Bytes that the service can grant."""

    host_total: int
    host_free: int
    """Free host memory; shared chunks without users count as free."""
    host_share: int
    """Max-min fair part for this rank if its job wants as much as possible; the rank may have to wait for it."""
    disk_total: int
    disk_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLease:
    """A file on the node's disk; its bytes 0 to `nbytes` are reserved for the lease, with any content."""

    path: Path
    """Path for messages; only the service's user can open the file."""
    fd: int
    """Descriptor for reading and writing, through the page cache until F_SETFL sets O_DIRECT. Closed with the lease."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """State that a rank's predecessor left when it was killed."""

    lease: Lease
    """Lease with its disk file; it belongs to this client now."""
    fd: int
    """Descriptor of the kept memory file, for reading and writing; closed with the lease."""
    nbytes: int
    meta: bytes
    """Description that the predecessor last gave to `Lease.set_meta`."""


class Lease:
    """Host memory and disk that this client may use until `end`. Made by `ServiceClient.lease`.

    Args:
        client: the client that holds it.
        granted: the service's answer.
        descriptors: those of the disk file and of the kept file, as far as there are any; closed with this.
    """

    def __init__(self, client: Holder, granted: LeaseGranted, descriptors: tuple[int, ...]) -> None:
        self.host_nbytes = granted.host_nbytes
        self.disk: DiskLease | None = None
        self.keep_fd: int | None = None
        """Descriptor of the kept memory file; None if there is none."""
        self.meta = b""
        self.number = granted.lease
        """Number that the service gave the lease; a new service gives another one."""
        self.is_ended = False
        self._client = client
        rest = list(descriptors)
        if granted.disk_path:
            self.disk = DiskLease(path=Path(granted.disk_path), fd=rest.pop(0), nbytes=granted.disk_nbytes)
        if rest:
            self.keep_fd = rest.pop(0)

    def keep_file(self, nbytes: int) -> int:
        """Make a memory file that the service keeps, with the lease, for a successor when this process is killed.

        Args:
            nbytes: its fixed length, counted in the lease's host bytes.

        Returns:
            A descriptor for reading and writing, closed with the lease. Memory is taken when it is written.

        Raises:
            ServiceError: the rank already has a kept file, the lease is smaller, or the connection is lost.
        """
        answer, descriptors = self._client.ask(lambda id: KeepFile(id=id, lease=self.number, nbytes=nbytes))
        assert isinstance(answer, FileGiven)
        (self.keep_fd,) = descriptors
        return self.keep_fd

    def set_meta(self, meta: bytes) -> None:
        """Store a description of the kept file; without a connection, it is sent to the next service.

        This also gives up those of the predecessor's shared chunks that this client has not asked for.

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
        """Give everything back and close the descriptors. Idempotent; does nothing in a forked child."""
        if self._client.take_back(self):
            close_all(self.descriptors)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Descriptors of the disk file and the kept file, as far as there are any."""
        disk = () if self.disk is None else (self.disk.fd,)
        return disk if self.keep_fd is None else (*disk, self.keep_fd)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class SharedChunk:
    """Read-only bytes that all processes of a user share, or the task of filling them; a context manager.

    Leaving the context gives up an unfilled chunk, so that another process can fill it; a filled one stays until
    `ServiceClient.release_shared`. Made by `ServiceClient.shared`.

    Args:
        client: the client that has it.
        key: key of the chunk.
        given: the service's answer.
        fd: descriptor; closed with this.
    """

    def __init__(self, client: Holder, key: str, given: SharedGiven, fd: int) -> None:
        self.key = key
        self.nbytes = given.nbytes
        self.digest = given.digest
        """Digest of the content; empty if the chunk is not filled."""
        self.fd = fd
        """Descriptor: read-only if the chunk is filled, else for the filler to map and write."""
        self.is_released = False
        self.is_own = False
        """Whether only this process has the chunk, because a new service already had another one with its key."""
        self._client = client

    @property
    def is_filled(self) -> bool:
        """Whether the chunk is filled; it stays filled."""
        return bool(self.digest)

    def fill_done(self, digest: str) -> None:
        """Seal what was written and give it to all waiting processes; `fd` is then a new, read-only descriptor.

        Args:
            digest: digest of the content, at most 128 printable characters. If the user has another chunk with this
                digest under another key, that one is used and this one is dropped.

        Raises:
            ServiceError: the chunk is still mapped for writing; unmap it first.
        """
        self._client.finish_filling(self, digest)

    def __enter__(self) -> SharedChunk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.is_filled:
            self._client.release_shared(self)
