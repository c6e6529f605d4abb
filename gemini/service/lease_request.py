"""What a rank asks for, and sums of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gemini.service.fairness import Amount
from gemini.service.member import Member

__all__ = ["LeaseRequest", "own_amount", "shared_nbytes", "whole_amount"]


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Memory for itself, and shared chunks that it will use."""

    number: int
    """Of the request, and of the lease that it becomes; 0: it is for shared chunks only and becomes none."""
    member: Member
    amount: Amount
    """For itself."""
    shared: dict[str, int]
    """Lengths of the chunks, by key."""


def own_amount(requests: Iterable[LeaseRequest]) -> Amount:
    """Return what requests are for without the shared chunks."""
    total = Amount()
    for each in requests:
        total += each.amount
    return total


def shared_nbytes(requests: Iterable[LeaseRequest]) -> dict[tuple[int, str], int]:
    """Return the lengths of the shared chunks that requests name, by user and key."""
    return {(each.member.job.user, key): nbytes for each in requests for key, nbytes in each.shared.items()}


def whole_amount(requests: Iterable[LeaseRequest]) -> Amount:
    """Return what requests would hold together if nothing they share were there yet."""
    requests = list(requests)
    return own_amount(requests) + Amount(host=sum(shared_nbytes(requests).values()))
