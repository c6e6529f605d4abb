"""Requests for leases, and sums of requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gemini.service.fairness import Amount
from gemini.service.member import Member

__all__ = ["LeaseRequest", "own_amount", "shared_nbytes", "whole_amount"]


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Memory for the rank itself, and the shared chunks that it will use."""

    number: int
    """Number of the request and of the lease that it becomes; 0 if it is for shared chunks only."""
    member: Member
    amount: Amount
    """Memory for the rank itself."""
    shared: dict[str, int]
    """Lengths of the shared chunks, by key."""


def own_amount(requests: Iterable[LeaseRequest]) -> Amount:
    """Return the sum of what requests ask for, without the shared chunks."""
    total = Amount()
    for each in requests:
        total += each.amount
    return total


def shared_nbytes(requests: Iterable[LeaseRequest]) -> dict[tuple[int, str], int]:
    """Return the lengths of the shared chunks that requests name, by user and key."""
    return {(each.member.job.user, key): nbytes for each in requests for key, nbytes in each.shared.items()}


def whole_amount(requests: Iterable[LeaseRequest]) -> Amount:
    """Return what requests would hold together if none of their shared chunks existed yet."""
    requests = list(requests)
    return own_amount(requests) + Amount(host=sum(shared_nbytes(requests).values()))
