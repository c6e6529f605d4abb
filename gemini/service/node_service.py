"""The service: accepts connections, and passes messages to leases, shared chunks and administration.

It has one event loop in one thread; blocking work (files on disk, the manifest) is done in other threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gemini.errors import ServiceError
from gemini.service.administration import Administration
from gemini.service.connection import Connection, ProtocolError
from gemini.service.disk_files import DiskFiles, lock_file
from gemini.service.fairness import Amount
from gemini.service.lease_manager import LeaseManager
from gemini.service.lease_queue import LeaseQueue
from gemini.service.ledger import NodeLedger
from gemini.service.manifest import (
    MANIFEST_VERSION,
    LeaseEntry,
    Manifest,
    ManifestWriter,
    process_start,
    read_manifest,
    unknown_lease,
)
from gemini.service.member import JobKey, Member
from gemini.service.messages import (
    PROTOCOL_VERSION,
    AdoptEnd,
    AdoptLease,
    AdoptShared,
    AskBudget,
    AskLease,
    AskState,
    Budget,
    Bye,
    ClientMessage,
    Drain,
    DropKept,
    EndLease,
    Evict,
    FillDone,
    FindShared,
    GiveUpFill,
    Hello,
    KeepFile,
    MemberMessage,
    Refused,
    ReleaseShared,
    SetMeta,
    TakeKept,
    Visit,
    Welcome,
    Withdraw,
)
from gemini.service.packets import close_all
from gemini.service.session import Session
from gemini.service.shared_chunk_manager import SharedChunkManager
from gemini.service.shared_holds import SharedHolds
from gemini.service.state import ServiceState

__all__ = ["NodeService", "ServiceOptions"]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
MAX_CONNECTIONS_PER_USER = 1024
BACKLOG = 512
TICK_S = 1.0
RETURN_S = 10.0
"""Seconds after the service's start in which clients with shared chunks are expected back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """Options that the service is started with."""

    socket_path: Path
    """Path of the socket; the manifest and a lock are beside it."""
    budget: Amount
    """Bytes to grant of host memory and of disk."""
    disk_directory: Path | None = None
    """Directory of the disk leases' files; None if there is no disk."""
    socket_mode: int = 0o600
    """Mode of the socket, as for a file; says who may connect."""
    socket_group: int | None = None
    """Group id of the socket; None for the service's own group."""
    grace_s: float = 600.0
    """Seconds that a dead rank's kept state waits for a successor."""
    warm_s: float = 600.0
    """Seconds that a shared chunk without users stays if its room is not needed."""
    drain_timeout_s: float = 10.0
    """Seconds that SIGTERM waits for jobs to end before the service exits without them."""


@dataclass(slots=True)
class NodeService:
    """The node's memory service, which `run` serves; used once per process.

    Args:
        options: the options.
    """

    options: ServiceOptions
    ledger: NodeLedger = field(init=False)
    queue: LeaseQueue = field(init=False)
    leases: LeaseManager = field(init=False)
    shared_chunks: SharedChunkManager = field(init=False)
    sessions: set[Session] = field(init=False, default_factory=set)
    administration: Administration = field(init=False)
    num_messages: int = field(init=False, default=0)
    num_malformed: int = field(init=False, default=0)
    """Number of connections that were ended because of a malformed message."""
    started_s: float = field(init=False, default_factory=time.monotonic)
    _connections: set[Connection] = field(init=False, default_factory=set)
    _disk: DiskFiles | None = field(init=False, default=None)
    _manifest: ManifestWriter = field(init=False)
    _listener: socket.socket = field(init=False)
    _stopped: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.ledger = NodeLedger(self.options.budget, SharedHolds())
        self.queue = LeaseQueue(self.ledger)
        self._manifest = ManifestWriter(self._manifest_path, self._manifest_now)
        self.shared_chunks = SharedChunkManager(self.ledger, self.queue, record_change=self._manifest.changed)
        self.leases = LeaseManager(
            self.ledger, self.queue, drop_shared=self.shared_chunks.forget, record_change=self._manifest.changed
        )
        state = ServiceState(
            ledger=self.ledger,
            leases=self.leases,
            shared_chunks=self.shared_chunks,
            sessions=self.sessions,
            started_s=self.started_s,
        )
        self.administration = Administration(state, self._stopped.set)

    @property
    def _manifest_path(self) -> Path:
        return self.options.socket_path.with_name(self.options.socket_path.name + ".manifest")

    async def run(self, started: asyncio.Event | None = None) -> None:
        """Serve until drained, or until SIGTERM or SIGINT.

        Args:
            started: event that is set when clients can connect.

        Raises:
            ServiceError: another service uses the socket or the directory.
            OffloadIOError: the socket or the directory cannot be used.
        """
        loop = asyncio.get_running_loop()
        path = self.options.socket_path
        lock = lock_file(path.with_name(path.name + ".lock"))
        try:
            if self.options.disk_directory is not None:
                self._disk = self.leases.disk = DiskFiles(self.options.disk_directory)
            self._expect_leases()
            self._listener = listen(self.options)
            loop.add_reader(self._listener, self._accept)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop_soon)
            ticking = asyncio.create_task(self._tick())
            if started is not None:
                started.set()
            logger.info("serving at %s", path)
            await self._stopped.wait()
            ticking.cancel()
            await self._close(loop)
        finally:
            if self._disk is not None:
                self._disk.close()
            os.close(lock)

    async def _close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave clients what they have; free what no living client holds."""
        loop.remove_reader(self._listener)
        self._listener.close()
        with suppress(FileNotFoundError):
            self.options.socket_path.unlink()
        for member in list(self.leases.kept):
            self.leases.drop_kept(member)
        self._manifest.changed()
        await self._manifest.close()
        self.administration.is_ending = True
        for connection in list(self._connections):
            connection.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _stop_soon(self) -> None:
        if self.administration.is_draining:
            self._stopped.set()
        else:
            self.administration.begin_drain(None)
            asyncio.get_running_loop().call_later(self.options.drain_timeout_s, self._stopped.set)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            self.leases.expire_kept(now_s - self.options.grace_s)
            self.leases.expire_lost(is_grace_over=now_s - self.started_s > self.options.grace_s)
            expired = self.shared_chunks.expire_lost(is_over=now_s - self.started_s > RETURN_S)
            if self.shared_chunks.expire(now_s - self.options.warm_s) or expired:
                self.leases.decide()
            self.leases.tell_reasons()
            self.administration.check_drained()

    # What a service before left

    def _expect_leases(self) -> None:
        manifest = read_manifest(self._manifest_path)
        files = self._disk.existing() if self._disk is not None else {}
        for chunk in manifest.shared if manifest is not None else ():
            self.shared_chunks.expect(chunk)
        for entry in manifest.leases if manifest is not None else ():
            if not entry.disk_name or files.pop(entry.disk_name, None) is not None:
                self.leases.expect(entry)
        for name, nbytes in files.items():
            assert self._disk is not None
            user = self._disk.user_of(name)
            assert user is not None
            self.leases.expect(unknown_lease(user, name, nbytes))
        self.leases.expire_lost(is_grace_over=False)
        self.shared_chunks.expire_lost(is_over=False)

    def _manifest_now(self) -> Manifest:
        leases = self._leases_to_write()
        return Manifest(version=MANIFEST_VERSION, leases=leases, shared=self.shared_chunks.entries(self.sessions))

    def _leases_to_write(self) -> list[LeaseEntry]:
        held = [(session, record) for session in self.sessions for record in session.leases.values()]
        entries = [
            LeaseEntry(
                number=record.number,
                user=session.user,
                job=record.member.job.name,
                rank=record.member.rank,
                pid=session.pid,
                process_start=process_start(session.pid),
                host_nbytes=record.amount.host,
                disk_nbytes=record.amount.disk,
                disk_name=record.disk_name,
            )
            for session, record in held
        ]
        return entries + [lost.entry for lost in self.leases.lost]

    # Connections

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError as error:  # out of descriptors, or the client has already gone
            logger.warning("cannot accept a client: %s", error)
            return
        session: Session | None = None

        def on_message(message: ClientMessage, descriptors: tuple[int, ...]) -> None:
            nonlocal session
            self.num_messages += 1
            if session is None:
                close_all(descriptors)
                session = self._begin(connection, message)
            else:
                self._handle(session, message, descriptors)

        def on_end() -> None:
            self._connections.discard(connection)
            self.num_malformed += connection.is_malformed
            if session is not None:
                self._end(session)

        connection = Connection(connected, on_message, on_end)
        self._connections.add(connection)
        num_of_user = sum(each.peer.user == connection.peer.user for each in self._connections)
        if len(self._connections) > MAX_CONNECTIONS or num_of_user > MAX_CONNECTIONS_PER_USER:
            logger.warning("user %d has too many connections; one more is ended", connection.peer.user)
            connection.close()

    def _begin(self, connection: Connection, message: ClientMessage) -> Session | None:
        if not isinstance(message, (Hello, Visit)):
            raise ProtocolError(f"expected hello or visit first, got {type(message).__name__}")
        if message.version != PROTOCOL_VERSION:
            text = f"this service speaks version {PROTOCOL_VERSION} of the protocol, not {message.version}"
            connection.send(Refused(0, "version", text))
            return None
        session = Session(connection)
        if isinstance(message, Hello):
            refusal = self._welcome_refusal(session, message)
            if refusal is not None:
                connection.send(refusal)
                return None
            session.member = Member(JobKey(session.user, message.job), message.rank)
            session.num_ranks, session.priority = message.num_ranks, message.priority
        kept = self.leases.kept.get(session.member) if session.member is not None else None
        self.sessions.add(session)
        connection.send(Welcome(PROTOCOL_VERSION, kept.record.describe_kept() if kept is not None else None))
        return session

    def _welcome_refusal(self, session: Session, hello: Hello) -> Refused | None:
        job = JobKey(session.user, hello.job)
        if hello.rank >= hello.num_ranks:
            raise ProtocolError(f"rank {hello.rank} of {hello.num_ranks}")
        if hello.priority > 0 and not self.administration.may_administer(session.user):
            return Refused(0, "forbidden", "only root and the service's own user may use a priority above 0")
        if self.administration.is_draining:
            return Refused(0, "draining", "the service is draining and takes no new jobs")
        for other in [each for each in self.sessions if each.member == Member(job, hello.rank)]:
            other.connection.receive_now()  # it may have ended already
            if other in self.sessions:
                is_same = other.pid == session.pid
                who = "this process already: close its engine" if is_same else f"process {other.pid} already"
                text = f"rank {hello.rank} of job {hello.job} is {who}, or name the job otherwise"
                return Refused(0, "conflict", text)
        others = {each.num_ranks for each in self.sessions if each.member is not None and each.member.job == job}
        others |= {kept.num_ranks for member, kept in self.leases.kept.items() if member.job == job}
        if others - {hello.num_ranks}:
            text = (
                f"job {hello.job} has {others.pop()} ranks here, not {hello.num_ranks}; evict it, or use another "
                "job name"
            )
            return Refused(0, "conflict", text)
        return None

    def _end(self, session: Session) -> None:
        self.sessions.discard(session)
        if session.member is None or self.administration.is_ending:
            return
        now_s = time.monotonic()
        self.leases.end_session(session, keep=not session.is_evicted, now_s=now_s)
        self.shared_chunks.release_all(session, now_s=now_s)
        self.leases.decide()
        self.administration.check_drained()

    # Messages

    def _handle(self, session: Session, message: ClientMessage, descriptors: tuple[int, ...]) -> None:
        if isinstance(message, (AdoptLease, AdoptShared)) and session.member is not None:
            adopt = self.leases.adopt if isinstance(message, AdoptLease) else self.shared_chunks.adopt
            return adopt(session, message, descriptors)  # type: ignore[arg-type]
        if descriptors:
            close_all(descriptors)
            raise ProtocolError(f"{type(message).__name__} comes with descriptors")
        if isinstance(message, (AskState, Evict, Drain)):
            return self.administration.handle(session, message)
        if session.member is None or isinstance(message, (Hello, Visit, AdoptLease, AdoptShared)):
            raise ProtocolError(f"{type(message).__name__} at this place")
        self._handle_member(session, session.member, message)

    def _handle_member(self, session: Session, member: Member, message: MemberMessage) -> None:
        now_s = time.monotonic()
        match message:
            case AskBudget():
                session.connection.send(self._budget(message.id, member.job, session.num_ranks))
            case AskLease() if self.administration.is_draining:
                session.refuse(message.id, "draining", "the service is draining and grants no more memory")
            case AskLease():
                self.leases.forget_lost_of(member, pid=session.pid)  # a client that comes back has adopted it before
                self.leases.ask(session, message)
            case Withdraw():
                self.shared_chunks.withdraw(session, message.request, now_s=now_s)
                self.leases.withdraw(session, message.request)
                session.done(message.id)
            case EndLease():
                self._end_lease(session, message, now_s)
            case KeepFile():
                self.leases.make_keep_file(session, message)
            case SetMeta():
                self.leases.set_meta(session, message)
            case TakeKept():
                self.leases.take_kept(session, message.id)
            case DropKept():
                self.leases.drop_kept(member)
                session.done(message.id)
            case FindShared():
                self.shared_chunks.find(session, message)
            case FillDone():
                self.shared_chunks.finish(session, message)
            case GiveUpFill() | ReleaseShared():
                self.shared_chunks.release(session, message.key, now_s=now_s)
                self.leases.decide()
                session.done(message.id)
            case AdoptEnd():
                self.leases.forget_lost_of(member)
                session.done(message.id)
            case Bye():
                session.is_evicted = not message.keep
                session.done(message.id)
                session.connection.close()

    def _end_lease(self, session: Session, message: EndLease, now_s: float) -> None:
        if message.lease not in session.leases:
            return session.refuse(message.id, "unknown", f"this rank has no lease {message.lease}")
        self.leases.end(session, message.lease)
        if not session.leases:
            self.shared_chunks.release_unfound(session, now_s=now_s)
        session.done(message.id)
        self.leases.decide()

    def _budget(self, request: int, job: JobKey, num_ranks: int) -> Budget:
        total, free = self.options.budget, self.ledger.free()
        return Budget(
            id=request,
            host_total=total.host,
            host_free=max(free.host, 0),
            host_share=self.queue.fair_host_nbytes(job) // num_ranks,
            disk_total=total.disk,
            disk_free=max(free.disk, 0),
        )


def listen(options: ServiceOptions) -> socket.socket:
    """Return the socket that clients connect to, after replacing one that a dead service left.

    Args:
        options: path, mode and group of the socket.

    Returns:
        A listening, non-blocking SOCK_SEQPACKET.

    Raises:
        ServiceError: something else is at the path, or the path cannot be used.
    """
    path = options.socket_path
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()  # this process holds the lock beside it, so no service answers there
        before = os.umask(0o177)  # no other user may connect until the mode is set
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if options.socket_group is not None:
            os.chown(path, -1, options.socket_group)
        path.chmod(options.socket_mode)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ServiceError(f"cannot listen at {path}: {error.strerror or error}; name another with --socket") from error
    return listener
