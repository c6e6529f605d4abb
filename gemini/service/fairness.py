"""The order of service and fair shares: arithmetic on plain numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Amount", "dominant_share", "fair_share"]


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes of the two tiers that a node's jobs share."""

    host: int = 0
    disk: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.host + other.host, self.disk + other.disk)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.host - other.host, self.disk - other.disk)

    def fits_in(self, free: Amount) -> bool:
        """Return whether there is room. An amount of zero fits even where the free amount is negative."""
        return (self.host == 0 or self.host <= free.host) and (self.disk == 0 or self.disk <= free.disk)


def dominant_share(held: Amount, budget: Amount) -> float:
    """Return the largest fraction of any tier that is held.

    Args:
        held: bytes held by one user or job.
        budget: the node's budget.

    Returns:
        A fraction, 0 or more.

    Source: Ghodsi et al. 2011, "Dominant Resource Fairness", section 3: serving the party with the smallest dominant
    share first is max-min fair over several resources.
    """
    pairs = ((held.host, budget.host), (held.disk, budget.disk))
    return max(amount / total if total else float(amount > 0) for amount, total in pairs)


def fair_share(total: int, demands: Iterable[int]) -> int:
    """Return the part of a resource that one more party gets if its demand is unlimited.

    Args:
        total: bytes to be shared.
        demands: maximum bytes that each of the other parties wants.

    Returns:
        The level of max-min fairness: a party that wants less than an equal part gets all of it; the rest is divided
        equally.

    Source: Bertsekas & Gallager 1992, "Data Networks", section 6.5.2 (water filling).
    """
    remaining, wanted = total, sorted(demands)
    num_sharing = len(wanted) + 1
    for demand in wanted:
        level = remaining // num_sharing
        if demand >= level:
            return level
        remaining, num_sharing = remaining - demand, num_sharing - 1
    return remaining
