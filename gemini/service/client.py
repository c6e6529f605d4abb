"""A job's side of the node's memory service: leases, kept state and shared chunks.

[Note: What the service's death changes]
Nothing that a client holds is lost: its memory is its own or mapped, and its files are open. A thread of the client
notices the death, warns once, and tells a new service, as soon as there is one, what the client holds. Until then
`lease` and `shared` wait, freed memory is not reported, and every other call raises ServiceError.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gemini.errors import OutOfTierMemoryError, ServiceError
from gemini.service.address import parse_address
from gemini.service.channel import Answer, Channel, ConnectionLostError, Exchange
from gemini.service.holdings import KeptState, Lease, NodeBudget, SharedChunk
from gemini.service.memory_files import open_read_only, seal_whole
from gemini.service.messages import (
    PROTOCOL_VERSION,
    AdoptEnd,
    AdoptLease,
    AdoptShared,
    AskBudget,
    AskLease,
    Budget,
    Bye,
    ClientMessage,
    DropKept,
    EndLease,
    FillDone,
    FindShared,
    GiveUpFill,
    Hello,
    Kept,
    LeaseGranted,
    Refused,
    ReleaseShared,
    SharedGiven,
    TakeKept,
    Withdraw,
)
from gemini.service.packets import close_all

__all__ = ["ServiceClient"]

logger = logging.getLogger(__name__)

BYE_TIMEOUT_S = 5.0


class ServiceClient:
    """One rank's connection to the node's memory service. Thread-safe; a forked child's copy does nothing.

    See [Note: What the service's death changes].

    Args:
        path: the service's socket.
        hello: the rank's first message, which identifies it.

    Raises:
        ServiceError: no service is there, or it refuses.
    """

    def __init__(self, path: Path, hello: Hello) -> None:
        self._hello = hello
        self._lock = threading.Lock()
        self._leases: list[Lease] = []
        """Leases that have not ended. Guarded by: `_lock`."""
        self._chunks: dict[str, SharedChunk] = {}
        """Shared chunks by key. Guarded by: `_lock`."""
        self._adopted: list[Lease | SharedChunk] = []
        self._channel = Channel(path, hello, resume=self._resume, resumed=self._end_meanwhile)
        self.kept: Kept | None = self._channel.welcome.kept
        """State kept from this rank's predecessor, until it is taken or dropped; None if nothing is kept."""

    @staticmethod
    def connect(address: str, *, job: str, rank: int = 0, num_ranks: int = 1, priority: int = 0) -> ServiceClient:
        """Connect to a service.

        Args:
            address: for example "unix:/run/gemini/service.sock".
            job: a name that the user chooses: printable ASCII without spaces, the same for all ranks and after a
                restart, and used by one job at a time.
            rank: this process's rank.
            num_ranks: number of ranks of the job.
            priority: -100 to 100; only root and the service's own user may use more than 0.

        Returns:
            The client; the caller closes it.

        Raises:
            ConfigError: the address has another form.
            ServiceError: no service is there, or it refuses.
        """
        path = parse_address(address)
        hello = Hello(version=PROTOCOL_VERSION, job=job, rank=rank, num_ranks=num_ranks, priority=priority)
        return ServiceClient(path, hello)

    @property
    def num_messages(self) -> int:
        """Number of messages sent and received so far; training adds none."""
        return self._channel.num_messages

    @property
    def is_connected(self) -> bool:
        """Whether the service is connected."""
        return self._channel.is_connected

    def budget(self) -> NodeBudget:
        """Ask for the node's budget.

        Returns:
            Totals, free amounts and a fair share, in bytes.

        Raises:
            ServiceError: the connection is lost.
        """
        answer, _ = self.ask(lambda id: AskBudget(id=id))
        assert isinstance(answer, Budget)
        return NodeBudget(
            host_total=answer.host_total,
            host_free=answer.host_free,
            host_share=answer.host_share,
            disk_total=answer.disk_total,
            disk_free=answer.disk_free,
        )

    # Leases

    def lease(
        self,
        host_nbytes: int,
        disk_nbytes: int,
        *,
        shared: dict[str, int] | None = None,
        timeout_s: float | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> Lease:
        """Ask for memory and wait until it is granted; several ranks wait until all have asked and all can be granted.

        A rank that already holds a lease or a shared chunk does not wait. So no rank holds a part while it waits for
        another rank's.

        Args:
            host_nbytes: host memory in bytes; the client allocates it itself once it is granted.
            disk_nbytes: disk space in bytes; 0 for none.
            shared: keys and lengths of the shared chunks that this rank will ask for (`shared`). A chunk counts once
                for all its users, and not at all if it exists.
            timeout_s: maximum wait in seconds; None: no limit.
            on_wait: called in this thread with the reason for the wait, each time it changes.

        Returns:
            The lease.

        Raises:
            OutOfTierMemoryError: it can never be granted, or this rank already holds something and it cannot be granted
                now.
            ServiceError: it was not granted in time, or the service refuses.
        """
        wanted = dict(shared or {})
        answer, descriptors = self._ask_patiently(
            lambda id: AskLease(id=id, host_nbytes=host_nbytes, disk_nbytes=disk_nbytes, shared=wanted),
            timeout_s,
            on_wait,
        )
        assert isinstance(answer, LeaseGranted)
        return self._add_lease(answer, descriptors)

    def take_kept(self) -> KeptState:
        """Take over the state kept from this rank's predecessor.

        Returns:
            The state, with the lease that it belongs to.

        Raises:
            ServiceError: nothing is kept, or the connection is lost.
        """
        kept = self.kept
        answer, descriptors = self.ask(lambda id: TakeKept(id=id))
        assert isinstance(answer, LeaseGranted)
        assert kept is not None
        lease = self._add_lease(answer, descriptors)
        lease.meta, self.kept = kept.meta, None
        assert lease.keep_fd is not None
        return KeptState(lease=lease, fd=lease.keep_fd, nbytes=answer.file_nbytes, meta=kept.meta)

    def drop_kept(self) -> None:
        """Free the state kept from this rank's predecessor.

        Raises:
            ServiceError: the connection is lost.
        """
        self.ask(lambda id: DropKept(id=id))
        self.kept = None

    def take_back(self, lease: Lease) -> bool:
        """End a lease, as `Lease.end` does; return whether the caller must close its descriptors."""
        with self._lock:
            if lease.is_ended or self._channel.is_foreign:
                return False
            lease.is_ended = True
            self._leases.remove(lease)
        self._tell(lambda id: EndLease(id=id, lease=lease.number))
        return True

    def _add_lease(self, granted: LeaseGranted, descriptors: tuple[int, ...]) -> Lease:
        lease = Lease(self, granted, descriptors)
        with self._lock:
            self._leases.append(lease)
        return lease

    # Shared chunks

    def shared(
        self,
        key: str,
        nbytes: int,
        *,
        timeout_s: float | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> SharedChunk:
        """Find a shared chunk, wait for the process that fills it, or get the task of filling it.

        If this client already has a filled chunk, the same object is returned again.

        Args:
            key: name of the content, for example a fingerprint of its source; keys belong to one user; at most 48
                printable characters.
            nbytes: its length.
            timeout_s: maximum wait in seconds for another process that fills the chunk; None: no limit.
            on_wait: called in this thread with the reason for the wait, each time it changes.

        Returns:
            The chunk, filled or to be filled.

        Raises:
            OutOfTierMemoryError: there is no room for a new chunk now; declare it when asking for a lease.
            ServiceError: the key belongs to a chunk of another length, the time limit passed, or the service refuses.
        """
        with self._lock:
            before = self._chunks.get(key)
        if before is not None and before.is_filled and before.nbytes == nbytes:
            return before
        answer, descriptors = self._ask_patiently(
            lambda id: FindShared(id=id, key=key, nbytes=nbytes), timeout_s, on_wait
        )
        assert isinstance(answer, SharedGiven)
        chunk = SharedChunk(self, key, answer, descriptors[0])
        with self._lock:
            self._chunks[key] = chunk
        return chunk

    def release_shared(self, chunk: SharedChunk) -> None:
        """Report that a shared chunk is no longer used here, and close its descriptor; mappings stay valid. Idempotent.

        Args:
            chunk: a chunk of this client.
        """
        with self._lock:
            if chunk.is_released or self._channel.is_foreign:
                return
            chunk.is_released = True
            if self._chunks.get(chunk.key) is chunk:
                del self._chunks[chunk.key]
        key = chunk.key
        self._tell(lambda id: ReleaseShared(id=id, key=key) if chunk.is_filled else GiveUpFill(id=id, key=key))
        os.close(chunk.fd)

    def finish_filling(self, chunk: SharedChunk, digest: str) -> None:
        """Seal a chunk, as `SharedChunk.fill_done` does."""
        try:
            seal_whole(chunk.fd)
        except OSError as error:
            raise ServiceError(
                f"shared chunk {chunk.key} cannot be sealed ({error.strerror}): unmap the memory through which it "
                "was written first"
            ) from error
        try:
            if chunk.is_own:
                raise ConnectionLostError("no service knows of it")
            answer, (filled,) = self.ask(lambda id: FillDone(id=id, key=chunk.key, digest=digest))
            assert isinstance(answer, SharedGiven)
        except ConnectionLostError:  # the next service is told that the chunk is filled
            filled = open_read_only(chunk.fd)
        with self._lock:
            before, chunk.fd, chunk.digest = chunk.fd, filled, digest
        os.close(before)

    # The end

    def close(self, *, keep: bool = False) -> None:
        """End the connection and all leases, and close their descriptors. Idempotent; does nothing in a forked child.

        Args:
            keep: whether a kept file stays for a successor, with its lease, as if this process had been killed.
        """
        if self._channel.is_foreign:
            return
        with self._lock:
            leases, self._leases = self._leases, []
            chunks, self._chunks = list(self._chunks.values()), {}
        request = self._channel.new_id()
        self._channel.is_ending = True
        try:
            self._channel.begin(request, Bye(id=request, keep=keep)).wait(BYE_TIMEOUT_S)
        except (ServiceError, TimeoutError) as error:
            logger.debug("the memory service could not be told that this client ends: %s", error)
        self._channel.close()
        for lease in leases:
            lease.is_ended = True
            close_all(lease.descriptors)
        for chunk in chunks:
            chunk.is_released = True
            os.close(chunk.fd)

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Asking

    def ask(self, message_of: Callable[[int], ClientMessage]) -> Answer:
        """Send a message that the service answers at once, and return the answer.

        Args:
            message_of: returns the message for a given number.

        Returns:
            The answer, and its descriptors, which the caller now owns.

        Raises:
            ServiceError: the service refuses, or the connection is lost.
        """
        request = self._channel.new_id()
        return _accepted(self._channel.ask(request, message_of(request)))

    def _tell(self, message_of: Callable[[int], ClientMessage]) -> None:
        self._channel.post(message_of(self._channel.new_id()))

    def _ask_patiently(
        self, message_of: Callable[[int], ClientMessage], timeout_s: float | None, on_wait: Callable[[str], None] | None
    ) -> Answer:
        """Send a message whose answer may take time, and send it again if the service dies during the wait."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            if not self._channel.wait_connected(left_s) or self._channel.is_foreign:
                raise ServiceError("the memory service is gone and has not returned in time")
            request = self._channel.new_id()
            try:
                pending = self._channel.begin(request, message_of(request))
            except ConnectionLostError:
                continue
            try:
                return _accepted(pending.wait(left_s, on_wait))
            except ConnectionLostError:
                continue
            except TimeoutError as error:
                self._withdraw(request)
                pending.abandon()
                raise ServiceError(f"not granted within {timeout_s} s; it waits for {error}") from error
            except BaseException:
                self._withdraw(request)
                pending.abandon()
                raise

    def _withdraw(self, request: int) -> None:
        self._tell(lambda id: Withdraw(id=id, request=request))

    # In the channel's thread, when a service is back

    def _resume(self, exchange: Exchange) -> None:
        """Tell a new service what this client holds."""
        with self._lock:
            leases, chunks = list(self._leases), list(self._chunks.values())
        self._adopted = [*leases, *chunks]
        for lease in leases:
            self._resume_lease(lease, exchange)
        for chunk in chunks:
            message = AdoptShared(id=0, key=chunk.key, digest=chunk.digest)
            answer, _ = exchange(message, (chunk.fd,))
            if isinstance(answer, Refused):
                chunk.is_own = True
                logger.warning("the new memory service does not count shared chunk %s: %s", chunk.key, answer.text)
        exchange(AdoptEnd(id=0), ())
        self.kept = None

    def _resume_lease(self, lease: Lease, exchange: Exchange) -> None:
        disk = lease.disk
        message = AdoptLease(
            id=0,
            lease=lease.number,
            host_nbytes=lease.host_nbytes,
            disk_nbytes=0 if disk is None else disk.nbytes,
            disk_name="" if disk is None else disk.path.name,
            meta=lease.meta,
        )
        answer, _ = exchange(message, () if lease.keep_fd is None else (lease.keep_fd,))
        if isinstance(answer, LeaseGranted):
            lease.number = answer.lease
        elif isinstance(answer, Refused):
            logger.warning("the new memory service does not count this process's lease: %s", answer.text)

    def _end_meanwhile(self) -> None:
        """Tell the new service what was given back while the client was reporting its holdings."""
        for each in self._adopted:
            if isinstance(each, Lease) and each.is_ended:
                self._tell(lambda id, number=each.number: EndLease(id=id, lease=number))  # type: ignore[misc]
            elif isinstance(each, SharedChunk) and each.is_released:
                self._tell(lambda id, key=each.key: ReleaseShared(id=id, key=key))  # type: ignore[misc]
        self._adopted = []


def _accepted(answer: Answer) -> Answer:
    """Return an answer that is not a refusal."""
    message, _ = answer
    if isinstance(message, Refused):
        if message.kind in ("never-fits", "full"):
            raise OutOfTierMemoryError(f"memory service: {message.text}")
        raise ServiceError(f"memory service: {message.text}")
    return answer
