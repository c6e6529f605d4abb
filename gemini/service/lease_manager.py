"""Handles leases from request to end with the queue's decisions. Knows sessions, not sockets or other requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from gemini.errors import OffloadIOError, ServiceError
from gemini.service.disk_files import DiskFiles
from gemini.service.fairness import Amount
from gemini.service.lease_queue import LeaseQueue
from gemini.service.ledger import NodeLedger
from gemini.service.manifest import LeaseEntry, process_start
from gemini.service.member import JobKey, Member
from gemini.service.memory_files import create_memory_file, is_sealed_length, nbytes_of
from gemini.service.messages import AdoptLease, AskLease, FileGiven, KeepFile, LeaseGranted, SetMeta, Waiting
from gemini.service.packets import close_all
from gemini.service.session import LeaseRecord, Session

__all__ = ["KeptRank", "LeaseManager", "LostLease"]

logger = logging.getLogger(__name__)

MAX_LEASES = 64
"""Maximum number of leases of one rank."""


@dataclass(slots=True)
class KeptRank:
    """Kept state of a rank that died."""

    record: LeaseRecord
    num_ranks: int
    priority: int
    since_s: float


@dataclass(slots=True)
class LostLease:
    """A lease that an earlier service granted and whose client has not come back yet."""

    number: int
    """Number in this service's ledger."""
    entry: LeaseEntry

    def is_over(self) -> bool:
        """Return whether the client's process is known to have died."""
        return self.entry.pid > 0 and process_start(self.entry.pid) != self.entry.process_start


class LeaseManager:
    """All leases of the node, and the requests that wait for one.

    Args:
        ledger: counts what is leased.
        queue: decides who gets what, and when.
        drop_shared: forgets warm shared chunks, given by user and key, that had to make room.
        record_change: returns a future that is done when the current leases are written to the manifest.
    """

    def __init__(
        self,
        ledger: NodeLedger,
        queue: LeaseQueue,
        *,
        drop_shared: Callable[[list[tuple[int, str]]], None],
        record_change: Callable[[], asyncio.Future[None]],
    ) -> None:
        # - What leases are taken from
        self.ledger, self.queue = ledger, queue
        self.disk: DiskFiles | None = None
        """Directory of the lease files; None if there is no disk to lease."""
        # - Leases without a client
        self.kept: dict[Member, KeptRank] = {}
        self.lost: list[LostLease] = []
        # - Requests on their way to leases
        self.num_granted = 0
        self._drop_shared, self._record_change = drop_shared, record_change
        self._asked: dict[int, tuple[Session, int, str]] = {}
        """Session, request number and last reason told, by the queue's number."""
        self._handing_over: set[asyncio.Task[None]] = set()

    # Asking

    def ask(self, session: Session, message: AskLease) -> None:
        """Enqueue a request; the answer is sent when the queue has decided."""
        assert session.member is not None
        if message.disk_nbytes and self.disk is None:
            return session.refuse(
                message.id, "never-fits", "the service has no disk to lease; start it with --nvme DIR:BYTES"
            )
        if len(session.leases) >= MAX_LEASES:
            return session.refuse(message.id, "too-many", f"a rank may have {MAX_LEASES} leases; end some")
        try:
            number = self.queue.ask(
                session.member,
                Amount(message.host_nbytes, message.disk_nbytes),
                num_ranks=session.num_ranks,
                priority=session.priority,
                shared=message.shared,
            )
        except ServiceError as error:
            return session.refuse(message.id, "conflict", str(error))
        self._asked[number] = (session, message.id, "")
        self.decide()

    def withdraw(self, session: Session, request: int) -> None:
        """Forget a request, or end the lease that it has become."""
        for number, (asker, asked, _) in list(self._asked.items()):
            if asker is session and asked == request:
                self.queue.withdraw(number)
                del self._asked[number]
        for record in [each for each in session.leases.values() if each.request == request]:
            self.end(session, record.number)
        self.decide()

    def refuse_all(self, text: str) -> None:
        """Refuse all waiting requests, because nothing will be granted any more."""
        for number, (session, request, _) in self._asked.items():
            self.queue.withdraw(number)
            session.refuse(request, "draining", text)
        self._asked.clear()

    def decide(self) -> None:
        """Grant and refuse everything that can be decided now; tell new requests why they wait."""
        decisions = self.queue.decide()
        self._drop_shared(decisions.dropped)
        for number, (kind, text) in decisions.refused.items():
            session, request, _ = self._asked.pop(number)
            session.refuse(request, "full" if kind == "full" else "never-fits", text)
        for number in decisions.granted:
            session, request, _ = self._asked.pop(number)
            self._grant(session, request, number)
        for number, (session, request, reason) in self._asked.items():
            if not reason:
                self._tell_reason(number, session, request)

    def tell_reasons(self) -> None:
        """Tell waiting clients the reason for their wait, if it has changed."""
        for number, (session, request, _) in list(self._asked.items()):
            self._tell_reason(number, session, request)

    def reason_of(self, session: Session) -> str | None:
        """Return the reason that a client was told for its wait; None if it waits for no lease."""
        return next((reason for asker, _, reason in self._asked.values() if asker is session), None)

    def _tell_reason(self, number: int, session: Session, request: int) -> None:
        reason = self.queue.reason(number)
        if reason != self._asked[number][2]:
            self._asked[number] = (session, request, reason)
            session.connection.send(Waiting(request, reason))

    # Granting

    def _grant(self, session: Session, request: int, number: int) -> None:
        lease = self.ledger.lease(number)
        assert lease is not None
        member, amount = lease
        record = LeaseRecord(number, member, amount, request)
        if amount.disk:
            assert self.disk is not None
            record.disk_name = self.disk.new_name(member.job.user)
        session.leases[number] = record
        self.num_granted += 1
        task = asyncio.create_task(self._hand_over(session, record))
        self._handing_over.add(task)
        task.add_done_callback(self._handing_over.discard)

    async def _hand_over(self, session: Session, record: LeaseRecord) -> None:
        """Prepare the file and the manifest, then tell the client if it is still connected."""
        written = self._record_change()
        descriptors: tuple[int, ...] = ()
        if self.disk is not None and record.disk_name:
            try:
                descriptors = (await asyncio.to_thread(self.disk.create, record.disk_name, record.amount.disk),)
            except OffloadIOError as error:
                record.disk_name = ""
                if record.number in session.leases:
                    self.end(session, record.number)
                    session.refuse(record.request, "disk", str(error))
                self.decide()
                return
        await written
        if record.number in session.leases:
            self._give(session, record, record.request, descriptors)
        elif self.disk is not None and record.disk_name and not self._is_kept(record):
            self.disk.remove(record.disk_name)
        close_all(descriptors)

    def _give(self, session: Session, record: LeaseRecord, request: int, descriptors: tuple[int, ...]) -> None:
        path = str(self.disk.directory / record.disk_name) if self.disk is not None and record.disk_name else ""
        message = LeaseGranted(request, record.number, record.amount.host, record.amount.disk, path, record.keep_nbytes)
        session.connection.send(message, descriptors)

    def _is_kept(self, record: LeaseRecord) -> bool:
        return any(each.record is record for each in self.kept.values())

    # Keeping

    def make_keep_file(self, session: Session, message: KeepFile) -> None:
        """Make the memory file that outlives a client, within its lease."""
        record = session.leases.get(message.lease)
        if record is None:
            return session.refuse(message.id, "unknown", f"this rank has no lease {message.lease}")
        if message.nbytes > record.amount.host:
            text = f"a kept file of {message.nbytes} bytes is larger than its lease of {record.amount.host} bytes of "
            "host memory"
            return session.refuse(message.id, "conflict", text)
        if any(each.keep_file >= 0 for each in session.leases.values()):
            return session.refuse(message.id, "conflict", "this rank has a kept file already; end its lease first")
        record.keep_file, record.keep_nbytes = create_memory_file(message.nbytes), message.nbytes
        session.connection.send(FileGiven(message.id), (record.keep_file,))

    def set_meta(self, session: Session, message: SetMeta) -> None:
        """Store a client's own description of its kept file in place of its predecessor's."""
        record = session.leases.get(message.lease)
        if record is None:
            return session.refuse(message.id, "unknown", f"this rank has no lease {message.lease}")
        record.meta = message.meta
        if record.member not in self.kept:
            self.ledger.shared.release_kept(record.member, now_s=time.monotonic())
        session.done(message.id)

    def take_kept(self, session: Session, request: int) -> None:
        """Give a client what was kept of its predecessor."""
        assert session.member is not None
        kept = self.kept.get(session.member)
        if kept is None:
            return session.refuse(request, "unknown", "nothing is kept of this rank")
        record = kept.record
        files = []
        if self.disk is not None and record.disk_name:
            try:
                files.append(self.disk.open(record.disk_name))
            except OffloadIOError as error:
                return session.refuse(request, "disk", str(error))
        del self.kept[session.member]
        self.ledger.take_kept(session.member, record.number)
        session.leases[record.number] = record
        self._record_change()
        self._give(session, record, request, (*files, record.keep_file))
        close_all(files)

    def drop_kept(self, member: Member) -> bool:
        """Free what is kept of a rank; return whether anything was kept."""
        kept = self.kept.pop(member, None)
        if kept is not None:
            self._free(kept.record)
            self.decide()
        return kept is not None

    def expire_kept(self, before_s: float) -> None:
        """Free everything that has been kept since before the given time."""
        for member in [member for member, kept in self.kept.items() if kept.since_s < before_s]:
            logger.info("rank %d of job %s has not come back; its kept state is freed", member.rank, member.job.name)
            self.drop_kept(member)

    # Ending

    def end(self, session: Session, number: int) -> None:
        """End a client's lease with everything that belongs to it, without looking at the queue."""
        self._free(session.leases.pop(number))

    def end_session(self, session: Session, *, keep: bool, now_s: float) -> None:
        """Free what an ended client held, or keep it for its successor."""
        for number, (asker, request, _) in list(self._asked.items()):
            if _job_of(asker) == _job_of(session):
                self.queue.withdraw(number)
                del self._asked[number]
            if asker is not session and _job_of(asker) == _job_of(session):
                text = "another rank of the job has ended, and all ranks are granted together: start all ranks again"
                asker.refuse(request, "conflict", text)
        for number, record in list(session.leases.items()):
            if keep and record.keep_file >= 0 and session.member is not None:
                del session.leases[number]
                record.request = -1
                self.drop_kept(session.member)  # the kept state that it did not take from its own predecessor
                self.kept[session.member] = KeptRank(record, session.num_ranks, session.priority, now_s)
                self.ledger.keep(number)
                self._record_change()
            else:
                self.end(session, number)

    def _free(self, record: LeaseRecord) -> None:
        self.ledger.end(record.number)
        if record.keep_file >= 0:
            self.ledger.shared.release_kept(record.member, now_s=time.monotonic())
        record.close_file()
        if self.disk is not None and record.disk_name:
            self.disk.remove(record.disk_name)
        self._record_change()

    # Adopting

    def expect(self, entry: LeaseEntry) -> None:
        """Count a lease of an earlier service whose client may still be there."""
        member = Member(JobKey(entry.user, entry.job), entry.rank)
        number = self.ledger.adopt(member, Amount(entry.host_nbytes, entry.disk_nbytes))
        self.lost.append(LostLease(number, entry))

    def adopt(self, session: Session, message: AdoptLease, descriptors: tuple[int, ...]) -> None:
        """Count what an earlier service granted to a client; takes over the descriptors."""
        assert session.member is not None
        amount = Amount(message.host_nbytes, message.disk_nbytes)
        lost = next((each for each in self.lost if self._means(each, session.member, message)), None)
        refusal = self._adoption_refusal(amount, lost, message, descriptors)
        if refusal:
            close_all(descriptors)
            return session.refuse(message.id, "conflict", refusal)
        if lost is not None:
            self.lost.remove(lost)
            self.ledger.end(lost.number)
        number = self.ledger.adopt(session.member, amount)
        record = LeaseRecord(number, session.member, amount, disk_name=message.disk_name, meta=message.meta)
        if descriptors:
            record.keep_file, record.keep_nbytes = descriptors[0], nbytes_of(descriptors[0])
        session.leases[number] = record
        self._record_change()
        self._give(session, record, message.id, ())
        self.decide()

    def _means(self, lost: LostLease, member: Member, message: AdoptLease) -> bool:
        entry = lost.entry
        if entry.user != member.job.user:
            return False
        if message.disk_name:
            return entry.disk_name == message.disk_name
        return (entry.number, entry.job, entry.rank) == (message.lease, member.job.name, member.rank)

    def _adoption_refusal(
        self, amount: Amount, lost: LostLease | None, message: AdoptLease, descriptors: tuple[int, ...]
    ) -> str:
        """Return why a lease is not adopted; empty if it is."""
        if bool(message.disk_name) != bool(message.disk_nbytes):
            return "a lease with disk has a file, and a lease without disk has none"
        if len(descriptors) > 1 or not all(is_sealed_length(each) for each in descriptors):
            return "expected at most one descriptor, of a memory file whose length is sealed"
        if descriptors and nbytes_of(descriptors[0]) > amount.host:
            return "the kept file is longer than its lease"
        if lost is None and (message.disk_name or not amount.fits_in(self.ledger.free())):
            return "no earlier service is known to have granted this lease, or it has ended; ask for another lease"
        if lost is not None and not amount.fits_in(self._adoptable(lost.entry)):
            return "the earlier service granted less"
        return ""

    def _adoptable(self, entry: LeaseEntry) -> Amount:
        """Return the possible size of a lost lease; of a file that is in no manifest, only the disk part is certain."""
        host = entry.host_nbytes if entry.job else max(self.ledger.free().host, 0)
        return Amount(host, entry.disk_nbytes)

    def expire_lost(self, *, is_grace_over: bool) -> None:
        """Free leases whose clients have died, or whose unseen clients have not come back within the grace period."""
        for lost in list(self.lost):
            if lost.is_over() or (lost.entry.pid == 0 and is_grace_over):
                self._forget_lost(lost)

    def forget_lost_of(self, member: Member, *, pid: int | None = None) -> None:
        """Free what an earlier service granted to a rank and the rank either never learned of or has ended since.

        Args:
            member: the rank.
            pid: process whose grants are freed; 0 (not known): all grants stay; None: none stays.
        """
        for lost in list(self.lost):
            entry = lost.entry
            is_of_member = (entry.user, entry.job, entry.rank) == (member.job.user, member.job.name, member.rank)
            if is_of_member and (pid is None or 0 < pid == entry.pid):
                self._forget_lost(lost)

    def _forget_lost(self, lost: LostLease) -> None:
        self.lost.remove(lost)
        self.ledger.end(lost.number)
        if self.disk is not None and lost.entry.disk_name:
            self.disk.remove(lost.entry.disk_name)
        self._record_change()
        self.decide()


def _job_of(session: Session) -> JobKey | None:
    return None if session.member is None else session.member.job
