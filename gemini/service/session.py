"""The state of one client in the service, and the answers to it."""

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
    """A lease and what belongs to it."""

    number: int
    """Number in the ledger."""
    member: Member
    amount: Amount
    request: int = -1
    """Number of the client's request, which the client may still withdraw; -1 if there is none."""
    disk_name: str = ""
    keep_file: int = -1
    """Descriptor of the memory file that outlives the client; -1 if there is none."""
    keep_nbytes: int = 0
    meta: bytes = b""

    def describe_kept(self) -> Kept:
        """Return the description of the kept lease for a successor."""
        return Kept(
            lease=self.number,
            host_nbytes=self.amount.host,
            disk_nbytes=self.amount.disk,
            file_nbytes=self.keep_nbytes,
            meta=self.meta,
        )

    def close_file(self) -> None:
        """Close the memory file."""
        if self.keep_file >= 0:
            os.close(self.keep_file)
            self.keep_file, self.keep_nbytes = -1, 0


@dataclass(slots=True, eq=False)
class Session:
    """A client that has identified itself."""

    connection: Connection
    member: Member | None = None
    """Rank that the client is; None for an administering client."""
    num_ranks: int = 1
    priority: int = 0
    leases: dict[int, LeaseRecord] = field(default_factory=dict)
    """Leases by number."""
    started_s: float = field(default_factory=time.monotonic)
    is_evicted: bool = False
    """Whether nothing of it is kept when it ends."""

    @property
    def user(self) -> int:
        """User id that the kernel reports."""
        return self.connection.peer.user

    @property
    def pid(self) -> int:
        """Id of the client's process; 0 if it cannot be seen from here."""
        return self.connection.peer.pid

    def done(self, request: int) -> None:
        """Answer that a request was carried out."""
        self.connection.send(Done(request))

    def refuse(self, request: int, kind: RefusedKind, text: str) -> None:
        """Answer that a request is refused, and why."""
        self.connection.send(Refused(request, kind, text))
