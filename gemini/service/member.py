"""The identity of a client of the memory service."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["JobKey", "Member"]


@dataclass(frozen=True, slots=True, order=True)
class JobKey:
    """A job; its name is unique among its user's jobs."""

    user: int
    name: str


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One rank of a job."""

    job: JobKey
    rank: int
