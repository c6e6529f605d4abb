"""What the service knows of one client, and how it answers it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gemini.service.fairness import Amount
from gemini.service.member import Member
from gemini.service.messages import Done, Kept, Refused, RefusedKind

if TYPE_CHECKING:
    from gemini.service.connection import Connection

__all__ = ["LeaseRecord", "Session"]


@dataclass(slots=True, eq=False)
class LeaseRecord:
    """A lease, and what belongs to it."""

    number: int
    """In the ledger."""
    member: Member
    amount: Amount
    request: int = -1
    """The client's, which it may still withdraw; -1: none."""
    disk_name: str = ""
    keep_file: int = -1
    """Descriptor of the memory file that outlives the client; -1: none."""
    keep_nbytes: int = 0
    meta: bytes = b""

    def describe_kept(self) -> Kept:
        """Return what a successor is told of it."""
        return Kept(
            lease=self.number,
            host_nbytes=self.amount.host,
            disk_nbytes=self.amount.disk,
            file_nbytes=self.keep_nbytes,
            meta=self.meta,
        )

    def close_file(self) -> None:
        """Let go of the memory file."""
        if self.keep_file >= 0:
            os.close(self.keep_file)
            self.keep_file, self.keep_nbytes = -1, 0


@dataclass(slots=True, eq=False)
class Session:
    """A client that has said who it is."""

    connection: Connection
    member: Member | None = None
    """None: a visitor."""
    num_ranks: int = 1
    priority: int = 0
    leases: dict[int, LeaseRecord] = field(default_factory=dict)
    """By number."""
    started_s: float = field(default_factory=time.monotonic)
    is_evicted: bool = False
    """Whether nothing of it is kept when it ends."""

    @property
    def user(self) -> int:
        """The user id, by the kernel's word."""
        return self.connection.peer.user

    @property
    def pid(self) -> int:
        """Of the client's process; 0: it cannot be seen from here."""
        return self.connection.peer.pid

    def done(self, request: int) -> None:
        """Say that something was done."""
        self.connection.send(Done(request))

    def refuse(self, request: int, kind: RefusedKind, text: str) -> None:
        """Say that something will not be done, and why."""
        self.connection.send(Refused(request, kind, text))
