"""Shared chunks: memory files that one client fills and all clients of its user read. Knows sessions and the ledger.

A chunk is *claimed* while a client fills it, and other clients wait. If the filler ends or gives up, the first waiting
client gets the claim, with a new file, because the old filler may still write to its own. A filled and sealed chunk is
read-only for all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gemini.service.fairness import Amount
from gemini.service.lease_queue import LeaseQueue
from gemini.service.ledger import NodeLedger
from gemini.service.manifest import SharedEntry, process_start
from gemini.service.member import JobKey, Member
from gemini.service.memory_files import (
    create_memory_file,
    is_sealed_length,
    is_sealed_whole,
    nbytes_of,
    open_read_only,
    seal_whole,
)
from gemini.service.messages import AdoptShared, FillDone, FindShared, SharedGiven, Waiting
from gemini.service.packets import close_all
from gemini.service.session import Session

__all__ = ["SharedChunkManager"]

MAX_CHUNKS = 4096
"""Maximum number of chunks of one user."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """State of a chunk; the ledger counts its bytes."""

    file: int
    """Descriptor: the filler's file, for writing, until the chunk is filled; then a read-only one."""
    nbytes: int
    filler: Session | None
    digest: str = ""
    """Digest of the content; empty if the chunk is not filled."""
    waiting: list[tuple[Session, int]] = field(default_factory=list)
    """Waiting sessions and their request numbers."""
    jobs: set[JobKey] = field(default_factory=set)
    """Jobs that have used it."""


@dataclass(slots=True, eq=False)
class _LostChunk:
    """A chunk of an earlier service's clients, none of which has come back yet."""

    lease: int
    """Number of the lease under which the ledger counts its bytes."""
    entry: SharedEntry
    finds: list[tuple[Session, FindShared]] = field(default_factory=list)
    """Sessions, with their requests, that wait until it is known whether a client has the chunk."""


class SharedChunkManager:
    """The node's shared chunks; each belongs to one user.

    Args:
        ledger: counts the chunks' bytes and users.
        queue: decides whether there is room for a new chunk.
        record_change: returns a future that is done when the current chunks are written to the manifest.
    """

    def __init__(
        self, ledger: NodeLedger, queue: LeaseQueue, *, record_change: Callable[[], asyncio.Future[None]]
    ) -> None:
        self.ledger, self.queue = ledger, queue
        self._record_change = record_change
        self._claiming: set[asyncio.Task[None]] = set()
        self._chunks: dict[tuple[int, str], _Chunk] = {}
        self._lost: dict[tuple[int, str], _LostChunk] = {}

    def find(self, session: Session, message: FindShared) -> None:
        """Give a chunk or the claim to fill it, or make the client wait for the process that fills it."""
        member = _member_of(session)
        where = (session.user, message.key)
        if where in self._lost:
            self._lost[where].finds.append((session, message))
            return session.connection.send(Waiting(message.id, f"the processes that have shared chunk {message.key}"))
        hold = self.ledger.shared.holds.get(where)
        if hold is not None and hold.nbytes != message.nbytes:
            text = f"shared chunk {message.key} has {hold.nbytes} bytes, not {message.nbytes}; use one key for one "
            "content"
            return session.refuse(message.id, "conflict", text)
        if hold is None and sum(user == session.user for user, _ in self.ledger.shared.holds) >= MAX_CHUNKS:
            return session.refuse(message.id, "too-many", f"a user may have {MAX_CHUNKS} shared chunks")
        dropped = self.queue.hold_shared(member, message.key, message.nbytes, priority=session.priority)
        if dropped is None:
            text = f"no room for the {message.nbytes} bytes of shared chunk {message.key} now; declare it in the lease"
            return session.refuse(message.id, "full", text)
        self.forget(dropped)
        chunk = self._chunks.get(where)
        if chunk is None:
            chunk = self._chunks[where] = _Chunk(create_memory_file(message.nbytes), message.nbytes, session)
            claiming = asyncio.create_task(self._give_claim(session, message.id, chunk))
            self._claiming.add(claiming)
            claiming.add_done_callback(self._claiming.discard)
            return
        chunk.jobs.add(member.job)
        self._record_change()
        if chunk.filler not in (None, session):
            chunk.waiting.append((session, message.id))
            session.connection.send(Waiting(message.id, f"another process to fill shared chunk {message.key}"))
        else:
            self._give(session, message.id, chunk)

    def finish(self, session: Session, message: FillDone) -> None:
        """Take a filled chunk, and give it to all clients that wait for it."""
        where = (session.user, message.key)
        chunk = self._chunks.get(where)
        if chunk is None or chunk.filler is not session:
            return session.refuse(message.id, "unknown", f"this client is not filling shared chunk {message.key}")
        try:
            seal_whole(chunk.file)
        except OSError as error:
            text = f"shared chunk {message.key} cannot be sealed ({error.strerror}): unmap it first"
            return session.refuse(message.id, "conflict", text)
        same = self._of_digest(session.user, message.digest, chunk.nbytes)
        filled = open_read_only(chunk.file if same is None else same.file)
        os.close(chunk.file)
        chunk.file, chunk.digest, chunk.filler = filled, message.digest, None
        self.ledger.shared.fill(*where, message.digest)
        self._give(session, message.id, chunk)
        for waiter, request in chunk.waiting:
            self._give(waiter, request, chunk)
        chunk.waiting.clear()

    def release(self, session: Session, key: str, *, now_s: float) -> None:
        """Stop counting a client as a user; if it was filling the chunk, pass the claim on."""
        member = _member_of(session)
        where = (session.user, key)
        chunk = self._chunks.get(where)
        if chunk is not None:
            chunk.waiting = [(waiter, request) for waiter, request in chunk.waiting if waiter is not session]
        self.ledger.shared.release(member, key, now_s=now_s)
        if chunk is not None and chunk.filler is session:
            self._pass_claim_on(where, chunk)
        hold = self.ledger.shared.holds.get(where)
        if hold is not None and not hold.is_filled and not hold.holders:
            self.drop([where])

    def release_all(self, session: Session, *, now_s: float) -> None:
        """Stop counting a client as a user of any chunk."""
        for lost in self._lost.values():
            lost.finds = [find for find in lost.finds if find[0] is not session]
        for user, key in list(self.ledger.shared.holds):
            if user == session.user:
                self.release(session, key, now_s=now_s)

    def release_unfound(self, session: Session, *, now_s: float) -> None:
        """Stop counting a client as a user of chunks that its lease covers but that it never asked for."""
        member = _member_of(session)
        for where, hold in list(self.ledger.shared.holds.items()):
            if member in hold.holders and where not in self._chunks:
                self.release(session, where[1], now_s=now_s)

    def withdraw(self, session: Session, request: int, *, now_s: float) -> None:
        """Forget that a client waits for a chunk."""
        for lost in self._lost.values():
            lost.finds = [find for find in lost.finds if find[0] is not session or find[1].id != request]
        for (_, key), chunk in list(self._chunks.items()):
            if (session, request) in chunk.waiting:
                self.release(session, key, now_s=now_s)

    def adopt(self, session: Session, message: AdoptShared, descriptors: tuple[int, ...]) -> None:
        """Take over a chunk that a client has from an earlier service; takes over the descriptor."""
        member = _member_of(session)
        where = (session.user, message.key)
        is_filled = bool(message.digest)
        if len(descriptors) != 1 or not (is_sealed_whole if is_filled else is_sealed_length)(descriptors[0]):
            close_all(descriptors)
            text = f"shared chunk {message.key}: expected the descriptor of a sealed memory file"
            return session.refuse(message.id, "conflict", text)
        nbytes = nbytes_of(descriptors[0])
        chunk, hold = self._chunks.get(where), self.ledger.shared.holds.get(where)
        if hold is not None and (hold.nbytes != nbytes or (chunk is not None and not (is_filled and chunk.digest))):
            close_all(descriptors)
            return session.refuse(message.id, "conflict", f"there is another shared chunk {message.key} already")
        if chunk is None:
            file = open_read_only(descriptors[0]) if is_filled else os.dup(descriptors[0])
            chunk = self._chunks[where] = _Chunk(file, nbytes, None if is_filled else session, message.digest)
        close_all(descriptors)
        chunk.jobs.add(member.job)
        waiting = self._forget_lost(where)
        self.ledger.shared.adopt(member, message.key, nbytes, is_filled=is_filled)
        if is_filled:
            self.ledger.shared.fill(*where, message.digest)
        self._record_change()
        session.done(message.id)
        for other, find in waiting:
            self.find(other, find)

    def expect(self, entry: SharedEntry) -> None:
        """Count a chunk that clients of an earlier service have."""
        number = self.ledger.adopt(Member(JobKey(entry.user, ""), 0), Amount(host=entry.nbytes))
        self._lost[entry.user, entry.key] = _LostChunk(number, entry)

    def expire_lost(self, *, is_over: bool) -> bool:
        """Stop expecting chunks of dead clients, or, if `is_over`, all chunks; return whether that made room."""
        gone = [where for where, lost in self._lost.items() if is_over or lost.entry.is_over()]
        for where in gone:
            self._find_again(where)
        return bool(gone)

    def _find_again(self, where: tuple[int, str]) -> None:
        for session, message in self._forget_lost(where):
            self.find(session, message)

    def _forget_lost(self, where: tuple[int, str]) -> list[tuple[Session, FindShared]]:
        lost = self._lost.pop(where, None)
        if lost is None:
            return []
        self.ledger.end(lost.lease)
        return lost.finds

    def entries(self, sessions: Iterable[Session]) -> list[SharedEntry]:
        """Return the chunks that clients have, for the manifest."""
        processes: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for session in sessions:
            for where, hold in self.ledger.shared.holds.items():
                if session.member in hold.holders and where in self._chunks:
                    processes.setdefault(where, []).append((session.pid, process_start(session.pid)))
        found = [
            SharedEntry(user=user, key=key, nbytes=self._chunks[user, key].nbytes, processes=each)
            for (user, key), each in processes.items()
        ]
        return found + [lost.entry for lost in self._lost.values()]

    def expire(self, before_s: float) -> bool:
        """Drop chunks that were unused since before the given time; return whether that made room."""
        shared = self.ledger.shared
        old = [where for where in shared.unused() if shared.holds[where].idle_since_s < before_s]
        self.drop(old)
        return bool(old)

    def drop_warm_of(self, job: JobKey) -> None:
        """Drop unused chunks that no other job has used."""
        unused = self.ledger.shared.unused()
        self.drop([where for where in unused if where in self._chunks and self._chunks[where].jobs == {job}])

    def drop(self, chunks: Iterable[tuple[int, str]]) -> None:
        """Drop chunks; their bytes are freed with the last mapping."""
        for where in chunks:
            self.ledger.shared.drop(*where)
            self.forget([where])

    def forget(self, chunks: Iterable[tuple[int, str]]) -> None:
        """Close the files of chunks that the ledger has dropped."""
        for where in chunks:
            chunk = self._chunks.pop(where, None)
            if chunk is not None:
                os.close(chunk.file)

    def waits_for(self, session: Session) -> str:
        """Return the key of the chunk that a client waits for; empty if there is none."""
        found = (key for (_, key), chunk in self._chunks.items() if any(who is session for who, _ in chunk.waiting))
        return next(found, "")

    async def _give_claim(self, session: Session, request: int, chunk: _Chunk) -> None:
        """Give a new chunk to its filler once the manifest names it; so no later service grants its bytes again."""
        chunk.jobs.add(_member_of(session).job)
        await self._record_change()
        if chunk.filler is session and chunk in self._chunks.values():
            self._give(session, request, chunk)

    def _pass_claim_on(self, where: tuple[int, str], chunk: _Chunk) -> None:
        os.close(chunk.file)
        if chunk.waiting:
            chunk.file = create_memory_file(chunk.nbytes)
            chunk.filler, request = chunk.waiting.pop(0)
            self._give(chunk.filler, request, chunk)
        else:
            del self._chunks[where]

    def _of_digest(self, user: int, digest: str, nbytes: int) -> _Chunk | None:
        found = (each for (whose, _), each in self._chunks.items() if whose == user and each.digest == digest)
        return next((each for each in found if each.nbytes == nbytes), None)

    def _give(self, session: Session, request: int, chunk: _Chunk) -> None:
        message = SharedGiven(request, bool(chunk.digest), chunk.nbytes, chunk.digest)
        session.connection.send(message, (chunk.file,))


def _member_of(session: Session) -> Member:
    assert session.member is not None
    return session.member
