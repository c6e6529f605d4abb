"""The queue for a node's memory and its order: pure decisions, no clock and no I/O.

[Note: No hold while waiting]
A rank that holds a lease or a shared chunk never waits for more: it is granted what is
free, or refused. The requests of all ranks of a job are granted together or not at all (such a set of requests is a
*gang*). So no two jobs each hold a part while they wait for the other's.

[Note: Limited overtaking]
Gangs are considered by priority, then by the dominant share that their user holds, then by
job, then by arrival. A gang that does not fit is skipped, so that no memory stays unused because of it. It is skipped
at most `MAX_OVERTAKEN` times for later gangs of its own or a lower priority. After that it is *due*: no gang of its
priority or a lower one is granted anything before it. So a stream of small requests delays a large request only by a
limited number of requests, and does not starve it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from gemini.errors import ServiceError
from gemini.service.fairness import Amount, dominant_share, fair_share
from gemini.service.lease_request import LeaseRequest, own_amount, whole_amount
from gemini.service.ledger import NodeLedger
from gemini.service.member import JobKey, Member
from gemini.tiers import format_nbytes

__all__ = ["MAX_OVERTAKEN", "LeaseQueue", "Decisions"]

MAX_OVERTAKEN = 8


@dataclass(frozen=True, slots=True)
class Decisions:
    """Result of one pass over the queue."""

    granted: list[int]
    """Numbers of the requests that became leases."""
    refused: dict[int, tuple[str, str]]
    """Kind ("never-fits" or "full") and reason of each refused request, by number."""
    dropped: list[tuple[int, str]]
    """User and key of the warm chunks that made room."""


@dataclass(slots=True)
class _Gang:
    job: JobKey
    priority: int
    num_ranks: int
    requests: dict[int, LeaseRequest] = field(default_factory=dict)
    arrival: int = 0
    """Arrival of its latest request."""
    num_overtaken: int = 0

    @property
    def is_complete(self) -> bool:
        return len(self.requests) == self.num_ranks

    @property
    def is_due(self) -> bool:
        return self.num_overtaken >= MAX_OVERTAKEN


class LeaseQueue:
    """The requests that wait for a lease, their order, and the answer to requests that do not wait.

    Args:
        ledger: what is granted; `decide` and `hold_shared` change it.
    """

    def __init__(self, ledger: NodeLedger) -> None:
        self.ledger = ledger
        self._gangs: dict[JobKey, _Gang] = {}
        self._growth: list[tuple[LeaseRequest, int]] = []
        """Requests of ranks that hold something, with their priority; the next `decide` answers them."""

    # Asking

    def ask(
        self,
        member: Member,
        amount: Amount,
        *,
        num_ranks: int = 1,
        priority: int = 0,
        shared: Mapping[str, int] | None = None,
    ) -> int:
        """Enqueue a request for `decide` to decide.

        Args:
            member: the rank that asks.
            amount: memory for the rank itself.
            num_ranks: number of ranks of its job; all must ask before any is granted.
            priority: a higher one is served first.
            shared: lengths of the shared chunks that the rank will use, by key.

        Returns:
            The request's number, and the lease's number once it is granted.

        Raises:
            ServiceError: the rank already waits.
        """
        gang = self._gangs.get(member.job)
        if gang is not None and member.rank in gang.requests:
            raise ServiceError(f"rank {member.rank} of job {member.job.name} waits for a lease already")
        request = LeaseRequest(self.ledger.new_number(), member, amount, dict(shared or {}))
        if self.ledger.is_holder(member):
            self._growth.append((request, priority))
            return request.number
        if gang is None:
            gang = self._gangs[member.job] = _Gang(member.job, priority, num_ranks)
        gang.requests[member.rank] = request
        gang.arrival = request.number
        gang.priority = min(gang.priority, priority)
        return request.number

    def withdraw(self, number: int) -> None:
        """Forget a request; an unknown or granted one is left alone."""
        for job, gang in list(self._gangs.items()):
            gang.requests = {rank: each for rank, each in gang.requests.items() if each.number != number}
            if not gang.requests:
                del self._gangs[job]
        self._growth = [(each, priority) for each, priority in self._growth if each.number != number]

    def decide(self) -> Decisions:
        """Grant everything that can be granted now, and refuse everything that can never be granted.

        Returns:
            What changed. No remaining request can be granted before something ends.
        """
        result = Decisions([], {}, [])
        self._refuse_impossible(result)
        for request, priority in self._growth:
            self._decide_growth(request, priority, result)
        self._growth.clear()
        while self._grant_next(result):
            pass
        return result

    def reason(self, number: int) -> str:
        """Return what a request waits for."""
        gang = next(each for each in self._gangs.values() if number in {r.number for r in each.requests.values()})
        if not gang.is_complete:
            missing = sorted(set(range(gang.num_ranks)) - set(gang.requests))
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            return f"the other ranks of its job, which have not asked yet: {shown} of {gang.num_ranks}"
        requests = gang.requests.values()
        needed, available = self.ledger.missing(requests), self.ledger.free(requests)
        if needed.fits_in(available):
            return "a job of its priority that has already been overtaken often"
        tiers = [("host memory", needed.host, available.host), ("disk", needed.disk, available.disk)]
        short = [
            f"{format_nbytes(asked)} of {name}, of which {format_nbytes(max(free, 0))} are free"
            for name, asked, free in tiers
            if asked > free
        ]
        return " and ".join(short)

    def hold_shared(self, member: Member, key: str, nbytes: int, *, priority: int = 0) -> list[tuple[int, str]] | None:
        """Count a rank as a user of a new or existing shared chunk.

        Args:
            member: the rank; the chunk belongs to the rank's user.
            key: the chunk's key.
            nbytes: length of a new chunk.
            priority: priority of the rank's job.

        Returns:
            User and key of the warm chunks that made room; None if there is no room and nothing was counted.
        """
        request = LeaseRequest(0, member, Amount(), {key: nbytes})
        if not self._may_grow(request, priority):
            return None
        if self.ledger.missing([request]) != Amount():
            self._count_overtaking(priority, self.ledger.new_number())
        return self.ledger.take([request])

    def fair_host_nbytes(self, job: JobKey) -> int:
        """Return the job's max-min fair part of host memory, whether or not it is free now."""
        wanted = self.ledger.host_nbytes_by_job()
        for gang in self._gangs.values():
            wanted[gang.job] = wanted.get(gang.job, 0) + own_amount(gang.requests.values()).host
        wanted.pop(job, None)
        total = self.ledger.budget.host - self.ledger.shared.used_nbytes()
        return fair_share(max(total, 0), wanted.values())

    def waiting(self) -> dict[int, Member]:
        """Return the ranks that wait, by request number."""
        return {each.number: each.member for gang in self._gangs.values() for each in gang.requests.values()}

    # Deciding

    def _refuse_impossible(self, result: Decisions) -> None:
        for job, gang in list(self._gangs.items()):
            most = whole_amount(gang.requests.values())
            if not most.fits_in(self.ledger.budget):
                text = _never_fits_text(most, self.ledger.budget, len(gang.requests))
                result.refused.update({each.number: ("never-fits", text) for each in gang.requests.values()})
                del self._gangs[job]

    def _decide_growth(self, request: LeaseRequest, priority: int, result: Decisions) -> None:
        most = whole_amount([request])
        if not most.fits_in(self.ledger.budget):
            result.refused[request.number] = ("never-fits", _never_fits_text(most, self.ledger.budget, 1))
        elif self._may_grow(request, priority):
            self._count_overtaking(priority, request.number)
            self._take([request], result)
        else:
            free = self.ledger.free()
            result.refused[request.number] = (
                "full",
                f"{_text_of(request.amount)} more for a rank that already holds memory cannot be granted now, and "
                f"such a rank may not wait; free: {_text_of(Amount(max(free.host, 0), max(free.disk, 0)))}; ask "
                "for everything in one lease",
            )

    def _may_grow(self, request: LeaseRequest, priority: int) -> bool:
        needed = self.ledger.missing([request])
        if needed == Amount():
            return True
        if any(each.is_complete and each.is_due and each.priority >= priority for each in self._gangs.values()):
            return False
        return needed.fits_in(self.ledger.free([request]))

    def _grant_next(self, result: Decisions) -> bool:
        for gang in self._in_order():
            requests = gang.requests.values()
            if self.ledger.missing(requests).fits_in(self.ledger.free(requests)):
                del self._gangs[gang.job]
                self._count_overtaking(gang.priority, gang.arrival)
                self._take(requests, result)
                return True
            if gang.is_due:
                return False
        return False

    def _in_order(self) -> list[_Gang]:
        def place(gang: _Gang) -> tuple[int, bool, float, float, int]:
            if gang.is_due:
                return -gang.priority, False, 0.0, 0.0, gang.arrival
            of_user = dominant_share(self.ledger.held(user=gang.job.user), self.ledger.budget)
            of_job = dominant_share(self.ledger.held(job=gang.job), self.ledger.budget)
            return -gang.priority, True, of_user, of_job, gang.arrival

        return sorted((gang for gang in self._gangs.values() if gang.is_complete), key=place)

    def _count_overtaking(self, priority: int, arrival: int) -> None:
        for gang in self._gangs.values():
            is_behind = priority < gang.priority or (priority == gang.priority and arrival > gang.arrival)
            gang.num_overtaken += gang.is_complete and is_behind

    def _take(self, requests: Collection[LeaseRequest], result: Decisions) -> None:
        result.dropped.extend(self.ledger.take(requests))
        result.granted.extend(each.number for each in requests)


def _text_of(amount: Amount) -> str:
    return f"{format_nbytes(amount.host)} of host memory and {format_nbytes(amount.disk)} of disk"


def _never_fits_text(asked: Amount, budget: Amount, num_ranks: int) -> str:
    of_ranks = f" for {num_ranks} ranks" if num_ranks > 1 else ""
    return (
        f"{_text_of(asked)}{of_ranks} can never be granted: the whole node has {_text_of(budget)}; ask for less, "
        "or start the service with more (--host-budget, --nvme DIR:BYTES)"
    )
