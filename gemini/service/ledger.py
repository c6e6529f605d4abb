"""The amounts that ranks hold of a node's memory: sums only, no clock and no I/O."""

from __future__ import annotations

from collections.abc import Collection

from gemini.service.fairness import Amount
from gemini.service.lease_request import LeaseRequest, own_amount, shared_nbytes
from gemini.service.member import JobKey, Member
from gemini.service.shared_holds import SharedHolds, kept_of

__all__ = ["NodeLedger"]


class NodeLedger:
    """The node's budgets and what is granted from them.

    Args:
        budget: bytes of each tier; the sum of what is held never exceeds it, except after `adopt`.
        shared: the node's shared chunks, which also count against the budget.
    """

    def __init__(self, budget: Amount, shared: SharedHolds) -> None:
        self.budget = budget
        self.shared = shared
        self._leases: dict[int, tuple[Member, Amount]] = {}
        self._last_number = 0

    def new_number(self) -> int:
        """Return a number that no request and no lease has had."""
        self._last_number += 1
        return self._last_number

    # Holding

    def take(self, requests: Collection[LeaseRequest]) -> list[tuple[int, str]]:
        """Grant requests that fit; the warm chunks that were unused for longest make room.

        Args:
            requests: the requests; their numbers become those of leases.

        Returns:
            User and key of the chunks that made room.
        """
        wanted, needed = shared_nbytes(requests), self.missing(requests)
        dropped = []
        for where in self.shared.unused():
            if needed.fits_in(self.budget - self.held() - Amount(host=self.shared.nbytes())):
                break
            if where not in wanted:
                self.shared.drop(*where)
                dropped.append(where)
        for each in requests:
            for key, nbytes in each.shared.items():
                self.shared.adopt(each.member, key, nbytes, is_filled=False)
            if each.number:
                self._leases[each.number] = (each.member, each.amount)
        return dropped

    def adopt(self, member: Member, amount: Amount) -> int:
        """Count what a rank already holds, whether or not it fits.

        Args:
            member: the rank.
            amount: what the rank holds.

        Returns:
            The new lease's number.
        """
        number = self.new_number()
        self._leases[number] = (member, amount)
        return number

    def end(self, number: int) -> None:
        """End a lease."""
        del self._leases[number]

    def keep(self, number: int) -> None:
        """Keep a lease after its rank's process has ended, as a user of all filled chunks that the rank uses."""
        member, amount = self._leases[number]
        self._leases[number] = (kept_of(member), amount)
        self.shared.keep(member)

    def take_kept(self, member: Member, number: int) -> None:
        """Give a kept lease to a rank's new process; chunks kept with it stay kept until `release_kept`."""
        self._leases[number] = (member, self._leases[number][1])

    # Looking

    def lease(self, number: int) -> tuple[Member, Amount] | None:
        """Return a lease's rank and amount; None if there is no such lease."""
        return self._leases.get(number)

    def held(self, *, user: int | None = None, job: JobKey | None = None, member: Member | None = None) -> Amount:
        """Return what leases hold: all of them, or only those of a user, a job or a rank."""
        total = Amount()
        for holder, amount in self._leases.values():
            if (
                user in (None, holder.job.user)
                and (job is None or job == holder.job)
                and (member is None or member == holder)
            ):
                total += amount
        return total

    def host_nbytes_by_job(self) -> dict[JobKey, int]:
        """Return the host memory that each job's leases hold."""
        total: dict[JobKey, int] = {}
        for holder, amount in self._leases.values():
            total[holder.job] = total.get(holder.job, 0) + amount.host
        return total

    def is_holder(self, member: Member) -> bool:
        """Return whether a rank has a lease or uses a shared chunk."""
        return any(holder == member for holder, _ in self._leases.values()) or self.shared.has_user(member)

    def free(self, requests: Collection[LeaseRequest] = ()) -> Amount:
        """Return what can be granted; warm chunks count as free. Negative if more was adopted than there is.

        Args:
            requests: requests to be granted; warm chunks that they name do not count as free, because they will be
                used.

        Returns:
            Bytes of each tier.
        """
        used_nbytes = self.shared.used_nbytes(wanted=shared_nbytes(requests))
        return self.budget - self.held() - Amount(host=used_nbytes)

    def missing(self, requests: Collection[LeaseRequest]) -> Amount:
        """Return what granting requests would add to the total held."""
        wanted = shared_nbytes(requests)
        absent = [nbytes for where, nbytes in wanted.items() if where not in self.shared.holds]
        return own_amount(requests) + Amount(host=sum(absent))
