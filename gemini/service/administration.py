"""The commands that inspect the service, end jobs, or end the service itself."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable

from gemini.service.member import JobKey, Member
from gemini.service.messages import AskState, Drain, Evict, MemberRow, NodeState, SharedRow, TierState
from gemini.service.session import Session
from gemini.service.state import ServiceState

__all__ = ["Administration"]

logger = logging.getLogger(__name__)

ROWS_IN_PART = 64
"""Maximum number of rows (ranks or shared chunks) in one part of the answer; keeps a packet within its limit."""


class Administration:
    """Answers `ps`, `evict` and `drain`.

    Args:
        state: the service's state.
        stop: ends the service.
    """

    def __init__(self, state: ServiceState, stop: Callable[[], None]) -> None:
        self.is_draining = False
        self.is_ending = False
        """Whether the service itself is closing connections now; if so, it leaves what the clients hold as it is."""
        self._state, self._stop = state, stop
        self._drain_evicts_after_s: float | None = None

    def may_administer(self, user: int) -> bool:
        """Return whether a user may see and end other users' jobs: root and the service's own user may."""
        return user in (0, os.geteuid())

    def handle(self, session: Session, message: AskState | Evict | Drain) -> None:
        """Answer a message."""
        if isinstance(message, AskState):
            self._tell_state(session, message)
        elif isinstance(message, Evict):
            self._evict_asked(session, message)
        elif not self.may_administer(session.user):
            session.refuse(message.id, "forbidden", "only root and the service's own user may drain the service")
        else:
            session.done(message.id)
            self.begin_drain(message.timeout_s)

    # Ending

    def begin_drain(self, timeout_s: float | None) -> None:
        """Grant nothing more, and stop when no job is left.

        Args:
            timeout_s: seconds after which jobs are evicted; None: never.
        """
        self.is_draining = True
        self._state.leases.refuse_all("the service is draining and grants no more memory")
        if timeout_s is not None:
            asyncio.get_running_loop().call_later(timeout_s, self._evict_all, timeout_s)
        self.check_drained()

    def check_drained(self) -> None:
        """Stop the service if it is draining and no job is left."""
        if self.is_draining and all(session.member is None for session in self._state.sessions):
            self._stop()

    def _evict_all(self, timeout_s: float) -> None:
        for job in {session.member.job for session in self._state.sessions if session.member is not None}:
            self.evict(job, timeout_s)

    def _evict_asked(self, session: Session, message: Evict) -> None:
        user = session.user if message.user < 0 else message.user
        if user != session.user and not self.may_administer(session.user):
            return session.refuse(
                message.id, "forbidden", "only root and the service's own user may evict jobs of other users"
            )
        if not self.evict(JobKey(user, message.job), message.timeout_s):
            return session.refuse(message.id, "unknown", f"user {user} has no job {message.job} here")
        session.done(message.id)

    def evict(self, job: JobKey, timeout_s: float) -> bool:
        """End a job: free its kept state now, ask its processes to end, and then kill them.

        Args:
            job: the job to end.
            timeout_s: seconds from SIGTERM to SIGKILL.

        Returns:
            Whether the job exists.
        """
        service = self._state
        sessions = [each for each in service.sessions if each.member is not None and each.member.job == job]
        kept = [member for member in service.leases.kept if member.job == job]
        for member in kept:
            service.leases.drop_kept(member)
        for session in sessions:
            session.is_evicted = True
            self._signal(session, signal.SIGTERM)
            asyncio.get_running_loop().call_later(timeout_s, self._signal, session, signal.SIGKILL)
        service.shared_chunks.drop_warm_of(job)
        service.leases.decide()
        return bool(sessions or kept)

    def _signal(self, session: Session, number: signal.Signals) -> None:
        if session.connection.is_closed:
            return
        process = session.connection.process
        if process is None:
            logger.warning("a process in another container cannot be signalled: only its leases are ended")
            return session.connection.close()
        try:
            signal.pidfd_send_signal(process, number)
        except ProcessLookupError:
            pass  # the connection's end is about to be noticed
        except PermissionError:
            logger.warning("process %d may not be signalled by this user: only its leases are ended", session.pid)
            session.connection.close()

    # Looking

    def _tell_state(self, session: Session, message: AskState) -> None:
        user = None if self.may_administer(session.user) else session.user
        members, shared = self.member_rows(user), self.shared_rows(user)
        rows = slice(message.part * ROWS_IN_PART, (message.part + 1) * ROWS_IN_PART)
        state = NodeState(
            id=message.id,
            is_last=rows.stop >= max(len(members), len(shared)),
            is_draining=self.is_draining,
            host=self.host_state(),
            disk=self.disk_state(),
            members=members[rows],
            shared=shared[rows],
        )
        session.connection.send(state)

    def host_state(self) -> TierState:
        """Return how host memory is used."""
        ledger, kept = self._state.ledger, self._kept_nbytes()[0]
        warm = ledger.shared.warm_nbytes()
        return TierState(
            total=ledger.budget.host,
            leased=ledger.held().host - kept,
            kept=kept,
            shared=ledger.shared.nbytes() - warm,
            warm=warm,
        )

    def disk_state(self) -> TierState:
        """Return how the disk is used."""
        ledger, kept = self._state.ledger, self._kept_nbytes()[1]
        return TierState(total=ledger.budget.disk, leased=ledger.held().disk - kept, kept=kept, shared=0, warm=0)

    def _kept_nbytes(self) -> tuple[int, int]:
        amounts = [kept.record.amount for kept in self._state.leases.kept.values()]
        return sum(each.host for each in amounts), sum(each.disk for each in amounts)

    def member_rows(self, user: int | None = None) -> list[MemberRow]:
        """Return all ranks that are connected, kept or expected; with `user`, only that user's."""
        service, now_s = self._state, time.monotonic()
        rows = [self._session_row(each, each.member, now_s) for each in service.sessions if each.member is not None]
        for member, kept in service.leases.kept.items():
            amount = kept.record.amount
            rows.append(
                MemberRow(
                    job=member.job.name,
                    user=member.job.user,
                    rank=member.rank,
                    num_ranks=kept.num_ranks,
                    pid=0,
                    state="kept",
                    host_nbytes=amount.host,
                    disk_nbytes=amount.disk,
                    shared_nbytes=service.ledger.shared.kept_nbytes(member),
                    priority=kept.priority,
                    age_s=now_s - kept.since_s,
                    waits_for="",
                )
            )
        for entry in (lost.entry for lost in service.leases.lost):
            rows.append(
                MemberRow(
                    job=entry.job or "(unknown)",
                    user=entry.user,
                    rank=entry.rank,
                    num_ranks=0,
                    pid=entry.pid,
                    state="lost",
                    host_nbytes=entry.host_nbytes,
                    disk_nbytes=entry.disk_nbytes,
                    shared_nbytes=0,
                    priority=0,
                    age_s=now_s - service.started_s,
                    waits_for="",
                )
            )
        return sorted((row for row in rows if user in (None, row.user)), key=lambda row: (row.user, row.job, row.rank))

    def _session_row(self, session: Session, member: Member, now_s: float) -> MemberRow:
        ledger = self._state.ledger
        amounts = [record.amount for record in session.leases.values()]
        waits_for = self._state.leases.reason_of(session)
        chunk = self._state.shared_chunks.waits_for(session)
        if waits_for is None and chunk:
            waits_for = f"another process to fill shared chunk {chunk}"
        shared = [hold.nbytes for hold in ledger.shared.holds.values() if member in hold.holders]
        holds = session.leases or shared
        return MemberRow(
            job=member.job.name,
            user=member.job.user,
            rank=member.rank,
            num_ranks=session.num_ranks,
            pid=session.pid,
            state="waiting" if waits_for is not None else "running" if holds else "idle",
            host_nbytes=sum(amount.host for amount in amounts),
            disk_nbytes=sum(amount.disk for amount in amounts),
            shared_nbytes=sum(shared),
            priority=session.priority,
            age_s=now_s - session.started_s,
            waits_for=waits_for or "",
        )

    def shared_rows(self, user: int | None = None) -> list[SharedRow]:
        """Return all shared chunks; with `user`, only that user's."""
        now_s = time.monotonic()
        return [
            SharedRow(
                key=key,
                user=whose,
                nbytes=hold.nbytes,
                is_filled=hold.is_filled,
                num_users=len(hold.holders),
                idle_s=0.0 if hold.holders else now_s - hold.idle_since_s,
            )
            for (whose, key), hold in sorted(self._state.ledger.shared.holds.items())
            if user in (None, whose)
        ]
