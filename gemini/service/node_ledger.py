"""Who holds how much of a node's memory, who waits, and who is next: pure decisions, no clock and no I/O.

[Note: Nobody holds while waiting]
A rank that holds something, a lease or a shared chunk, never waits for more: it is granted what is free, or refused.
And a job of several ranks is granted what all of them ask for at once, or none of it (a *gang*). So jobs cannot each
hold a part and wait for the other's.

[Note: Nobody is overtaken for ever]
Gangs are looked at by priority, then by the dominant share that their user holds, then their job, then by arrival.
One that does not fit is passed over, so that no memory lies idle behind it, but only `MAX_OVERTAKEN` times by gangs
of its own or a lower priority that came later; then it is *due*: nobody of its priority or a lower one is granted
anything until it has been. A stream of small requests can so delay a big one, by a bounded number of them, and not
starve it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gemini.errors import ServiceError
from gemini.service.fairness import Amount, dominant_share, fair_share
from gemini.tiers import format_nbytes

__all__ = ["MAX_OVERTAKEN", "JobKey", "Member", "NodeLedger", "Settlement", "SharedHold"]

MAX_OVERTAKEN = 8


@dataclass(frozen=True, slots=True, order=True)
class JobKey:
    """A job: names are each user's own."""

    user: int
    name: str


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One rank of a job."""

    job: JobKey
    rank: int


@dataclass(slots=True)
class SharedHold:
    """A shared chunk, whose bytes are counted once, whoever uses it."""

    nbytes: int
    content: str
    """What is in it; a user's chunks with the same content are one, and counted once."""
    holders: set[Member] = field(default_factory=set)
    is_filled: bool = False
    idle_since_s: float = 0.0
    """When the last holder let go."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What came of looking at everybody who waits."""

    granted: list[int]
    """Numbers of requests that are now leases."""
    refused: dict[int, tuple[str, str]]
    """Numbers of requests that ended otherwise: kind ("never-fits" or "full") and why."""
    dropped: list[tuple[int, str]]
    """User and key of warm chunks that made room."""


@dataclass(frozen=True, slots=True)
class _Request:
    number: int
    member: Member
    amount: Amount
    shared: dict[str, int]


@dataclass(slots=True)
class _Gang:
    job: JobKey
    priority: int
    num_ranks: int
    requests: dict[int, _Request] = field(default_factory=dict)
    arrival: int = 0
    """Of its latest request."""
    num_overtaken: int = 0

    @property
    def is_complete(self) -> bool:
        return len(self.requests) == self.num_ranks

    @property
    def is_due(self) -> bool:
        return self.num_overtaken >= MAX_OVERTAKEN


class NodeLedger:
    """The node's budgets, what is granted of them and who waits.

    Args:
        budget: bytes of each tier; the sum of what is held never exceeds it, unless `adopt` says so.
    """

    def __init__(self, budget: Amount) -> None:
        self.budget = budget
        self.shared: dict[tuple[int, str], SharedHold] = {}
        """By user and key."""
        self._leases: dict[int, tuple[Member, Amount]] = {}
        self._gangs: dict[JobKey, _Gang] = {}
        self._growth: list[tuple[_Request, int]] = []
        """Requests of ranks that hold something, with their priority: answered by the next `settle`."""
        self._last_number = 0

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
        """Put a request in, for `settle` to decide.

        Args:
            member: who asks.
            amount: what for itself.
            num_ranks: of its job; all must ask before any is granted.
            priority: higher is served first.
            shared: lengths of the shared chunks it will use, by key.

        Returns:
            The request's number, and the lease's once it is granted.

        Raises:
            ServiceError: the rank waits already.
        """
        gang = self._gangs.get(member.job)
        if gang is not None and member.rank in gang.requests:
            raise ServiceError(f"rank {member.rank} of job {member.job.name} waits for a lease already")
        request = _Request(self._next_number(), member, amount, dict(shared or {}))
        if self._holds(member):
            self._growth.append((request, priority))
            return request.number
        if gang is None:
            gang = self._gangs[member.job] = _Gang(member.job, priority, num_ranks)
        gang.requests[member.rank] = request
        gang.arrival = request.number
        gang.priority = min(gang.priority, priority)
        return request.number

    def withdraw(self, number: int) -> None:
        """Forget a request; one that is unknown, or granted, is left alone."""
        for job, gang in list(self._gangs.items()):
            gang.requests = {rank: each for rank, each in gang.requests.items() if each.number != number}
            if not gang.requests:
                del self._gangs[job]
        self._growth = [(each, priority) for each, priority in self._growth if each.number != number]

    def settle(self) -> Settlement:
        """Grant whatever can be granted now, and refuse what never can.

        Returns:
            What changed. Nothing is left that could be granted before something ends.
        """
        result = Settlement([], {}, [])
        self._refuse_impossible(result)
        for request, priority in self._growth:
            self._settle_growth(request, priority, result)
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
            return f"its job's other ranks, which have not asked yet: {shown} of {gang.num_ranks}"
        needed, available = self._needed(gang), self._available(gang)
        if needed.fits_in(available):
            return "a job of its priority that has been overtaken often enough"
        tiers = [("host memory", needed.host, available.host), ("disk", needed.disk, available.disk)]
        short = [
            f"{format_nbytes(asked)} of {name}, of which {format_nbytes(max(free, 0))} are free"
            for name, asked, free in tiers
            if asked > free
        ]
        return " and ".join(short)

    # Holding

    def end(self, number: int) -> None:
        """Take a lease back."""
        del self._leases[number]

    def adopt(self, member: Member, amount: Amount) -> int:
        """Count what somebody holds already, whether or not it fits.

        Args:
            member: the holder.
            amount: what it holds.

        Returns:
            The new lease's number.
        """
        number = self._next_number()
        self._leases[number] = (member, amount)
        return number

    def lease(self, number: int) -> tuple[Member, Amount] | None:
        """Return whose a lease is and what it holds; None: there is no such lease."""
        return self._leases.get(number)

    def hold_shared(self, member: Member, key: str, nbytes: int, *, priority: int = 0) -> list[tuple[int, str]] | None:
        """Count a rank as a user of a shared chunk, new or there.

        Args:
            member: the user; its user's chunks are meant.
            key: which.
            nbytes: length of a new one.
            priority: of its job.

        Returns:
            User and key of warm chunks that made room; None: there is no room, and nothing is counted.
        """
        request = _Request(0, member, Amount(), {key: nbytes})
        if not self._may_grow(request, priority):
            return None
        if self._missing([request]) != Amount():
            self._count_overtaking(priority, self._next_number())
        result = Settlement([], {}, [])
        self._take([request], result)
        return result.dropped

    def adopt_shared(self, member: Member, key: str, nbytes: int, *, is_filled: bool) -> None:
        """Count a chunk that a rank uses already, whether or not it fits."""
        hold = self.shared.setdefault((member.job.user, key), SharedHold(nbytes, f"key {key}"))
        hold.holders.add(member)
        hold.is_filled |= is_filled

    def fill_shared(self, user: int, key: str, digest: str) -> None:
        """Note that a chunk is filled, with a content that another key may have too."""
        hold = self.shared[user, key]
        hold.is_filled, hold.content = True, f"digest {digest} {hold.nbytes}"

    def release_shared(self, member: Member, key: str, *, now_s: float) -> None:
        """Count a rank no longer as a user; a filled chunk without users stays, warm, until `drop_shared` or need."""
        hold = self.shared.get((member.job.user, key))
        if hold is not None and member in hold.holders:
            hold.holders.remove(member)
            hold.idle_since_s = now_s

    def keep(self, number: int) -> None:
        """Let a lease outlive its rank's process, and count it as a user of all filled chunks that the rank uses."""
        member, amount = self._leases[number]
        self._leases[number] = (_kept(member), amount)
        for hold in self.shared.values():
            if member in hold.holders and hold.is_filled:
                hold.holders.add(_kept(member))

    def take_kept(self, member: Member, number: int) -> None:
        """Let a kept lease be that of a rank's new process; what it uses is its own until `release_kept_shared`."""
        self._leases[number] = (member, self._leases[number][1])

    def release_kept_shared(self, member: Member, *, now_s: float) -> None:
        """Count what was kept of a rank no longer as a user of chunks."""
        for _, key in list(self.shared):
            self.release_shared(_kept(member), key, now_s=now_s)

    def kept_shared_nbytes(self, member: Member) -> int:
        """Return the bytes of shared chunks that what is kept of a rank uses."""
        return sum(hold.nbytes for hold in self.shared.values() if _kept(member) in hold.holders)

    def drop_shared(self, user: int, key: str) -> None:
        """Forget a chunk."""
        del self.shared[user, key]

    def unused(self) -> list[tuple[int, str]]:
        """Return chunks without users, the longest unused first."""
        unused = [(hold.idle_since_s, where) for where, hold in self.shared.items() if not hold.holders]
        return [where for _, where in sorted(unused)]

    # Looking

    def held(self, *, user: int | None = None, job: JobKey | None = None, member: Member | None = None) -> Amount:
        """Return what leases hold: all, or a user's, a job's or a rank's."""
        total = Amount()
        for holder, amount in self._leases.values():
            if (
                user in (None, holder.job.user)
                and (job is None or job == holder.job)
                and (member is None or member == holder)
            ):
                total += amount
        return total

    def shared_nbytes(self) -> int:
        """Return the bytes of shared chunks, warm ones included."""
        return _content_nbytes(self.shared)

    def warm_nbytes(self) -> int:
        """Return the bytes of shared chunks without users."""
        used = {where: hold for where, hold in self.shared.items() if hold.holders}
        return self.shared_nbytes() - _content_nbytes(used)

    def free(self) -> Amount:
        """Return what could be granted, warm chunks counted as free; negative if more is adopted than there is."""
        return self.budget - self.held() - Amount(host=self.shared_nbytes() - self.warm_nbytes())

    def fair_host_nbytes(self, job: JobKey) -> int:
        """Return the job's max-min fair part of host memory, whether or not it is free now."""
        wanted: dict[JobKey, int] = {}
        for holder, amount in self._leases.values():
            wanted[holder.job] = wanted.get(holder.job, 0) + amount.host
        for gang in self._gangs.values():
            wanted[gang.job] = wanted.get(gang.job, 0) + sum(each.amount.host for each in gang.requests.values())
        wanted.pop(job, None)
        total = self.budget.host - self.shared_nbytes() + self.warm_nbytes()
        return fair_share(max(total, 0), wanted.values())

    def waiting(self) -> dict[int, Member]:
        """Return who waits, by the request's number."""
        return {each.number: each.member for gang in self._gangs.values() for each in gang.requests.values()}

    # Deciding

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _holds(self, member: Member) -> bool:
        return any(holder == member for holder, _ in self._leases.values()) or any(
            member in hold.holders for hold in self.shared.values()
        )

    def _refuse_impossible(self, result: Settlement) -> None:
        for job, gang in list(self._gangs.items()):
            most = _sum_of(gang.requests.values())
            if not most.fits_in(self.budget):
                text = _never_fits_text(most, self.budget, len(gang.requests))
                result.refused.update({each.number: ("never-fits", text) for each in gang.requests.values()})
                del self._gangs[job]

    def _settle_growth(self, request: _Request, priority: int, result: Settlement) -> None:
        most = _sum_of([request])
        if not most.fits_in(self.budget):
            result.refused[request.number] = ("never-fits", _never_fits_text(most, self.budget, 1))
        elif self._may_grow(request, priority):
            self._count_overtaking(priority, request.number)
            self._take([request], result)
        else:
            free = self.free()
            result.refused[request.number] = (
                "full",
                f"{_text_of(request.amount)} more for a rank that holds something, which may not wait; free: "
                f"{_text_of(Amount(max(free.host, 0), max(free.disk, 0)))}; ask for everything in one lease",
            )

    def _may_grow(self, request: _Request, priority: int) -> bool:
        needed = self._missing([request])
        if needed == Amount():
            return True
        if any(each.is_complete and each.is_due and each.priority >= priority for each in self._gangs.values()):
            return False
        return needed.fits_in(self._available_beside([request]))

    def _grant_next(self, result: Settlement) -> bool:
        for gang in self._in_order():
            if self._needed(gang).fits_in(self._available(gang)):
                del self._gangs[gang.job]
                self._count_overtaking(gang.priority, gang.arrival)
                self._take(list(gang.requests.values()), result)
                return True
            if gang.is_due:
                return False
        return False

    def _in_order(self) -> list[_Gang]:
        def place(gang: _Gang) -> tuple[int, bool, float, float, int]:
            if gang.is_due:
                return -gang.priority, False, 0.0, 0.0, gang.arrival
            of_user = dominant_share(self.held(user=gang.job.user), self.budget)
            of_job = dominant_share(self.held(job=gang.job), self.budget)
            return -gang.priority, True, of_user, of_job, gang.arrival

        return sorted((gang for gang in self._gangs.values() if gang.is_complete), key=place)

    def _count_overtaking(self, priority: int, arrival: int) -> None:
        for gang in self._gangs.values():
            is_behind = priority < gang.priority or (priority == gang.priority and arrival > gang.arrival)
            gang.num_overtaken += gang.is_complete and is_behind

    def _take(self, requests: list[_Request], result: Settlement) -> None:
        wanted = _keys_of(requests)
        needed = self._missing(requests)
        for where in self.unused():
            if needed.fits_in(self.budget - self.held() - Amount(host=self.shared_nbytes())):
                break
            if where not in wanted:
                del self.shared[where]
                result.dropped.append(where)
        for each in requests:
            for key, nbytes in each.shared.items():
                self.adopt_shared(each.member, key, nbytes, is_filled=False)
            if each.number:
                self._leases[each.number] = (each.member, each.amount)
                result.granted.append(each.number)

    def _needed(self, gang: _Gang) -> Amount:
        return self._missing(gang.requests.values())

    def _missing(self, requests: Iterable[_Request]) -> Amount:
        """Return what granting would add to what is held."""
        requests = list(requests)
        absent = {where: nbytes for where, nbytes in _keys_of(requests).items() if where not in self.shared}
        return _total(requests) + Amount(host=sum(absent.values()))

    def _available(self, gang: _Gang) -> Amount:
        return self._available_beside(gang.requests.values())

    def _available_beside(self, requests: Iterable[_Request]) -> Amount:
        """Return what is free if warm chunks make room, but for those that the requests are for."""
        wanted = _keys_of(requests)
        used = {where: hold for where, hold in self.shared.items() if hold.holders or where in wanted}
        return self.budget - self.held() - Amount(host=_content_nbytes(used))


def _kept(member: Member) -> Member:
    """Return who stands among the holders of chunks for what is kept of a rank, beside a process of that rank."""
    return Member(member.job, -1 - member.rank)


def _content_nbytes(holds: Mapping[tuple[int, str], SharedHold]) -> int:
    return sum({(user, hold.content): hold.nbytes for (user, _), hold in holds.items()}.values())


def _keys_of(requests: Iterable[_Request]) -> dict[tuple[int, str], int]:
    return {(each.member.job.user, key): nbytes for each in requests for key, nbytes in each.shared.items()}


def _total(requests: Iterable[_Request]) -> Amount:
    total = Amount()
    for each in requests:
        total += each.amount
    return total


def _sum_of(requests: Iterable[_Request]) -> Amount:
    """Return what requests would hold together if nothing they share were there yet."""
    requests = list(requests)
    return _total(requests) + Amount(host=sum(_keys_of(requests).values()))


def _text_of(amount: Amount) -> str:
    return f"{format_nbytes(amount.host)} of host memory and {format_nbytes(amount.disk)} of disk"


def _never_fits_text(asked: Amount, budget: Amount, num_ranks: int) -> str:
    of_ranks = f" for {num_ranks} ranks" if num_ranks > 1 else ""
    return (
        f"{_text_of(asked)}{of_ranks} can never be granted: the whole node has {_text_of(budget)}; ask for less, "
        "or start the service with more (--host-budget, --nvme DIR:BYTES)"
    )
