"""Who is next, and how much is a fair share: arithmetic on plain numbers."""

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
        """Return whether there is room; what needs nothing fits even where less than nothing is free."""
        return (self.host == 0 or self.host <= free.host) and (self.disk == 0 or self.disk <= free.disk)


def dominant_share(held: Amount, budget: Amount) -> float:
    """Return the fraction of the tier of which most is held.

    Args:
        held: by one user or job.
        budget: of the node.

    Returns:
        From 0 up.

    Source: Ghodsi et al. 2011, "Dominant Resource Fairness", section 3: to serve who has the smallest one is max-min
    fair over several resources.
    """
    pairs = ((held.host, budget.host), (held.disk, budget.disk))
    return max(amount / total if total else float(amount > 0) for amount, total in pairs)


def fair_share(total: int, demands: Iterable[int]) -> int:
    """Return what one more party gets of a resource if it would take whatever it can get.

    Args:
        total: bytes to be shared.
        demands: bytes that each of the others wants at most.

    Returns:
        The level of max-min fairness: who wants less than an equal part gets it all, and the rest is cut equally.

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
