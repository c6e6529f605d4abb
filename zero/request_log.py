"""Detects, while a rank waits, that another rank has called a different collective and will never come.

Each rank numbers its requests and keeps a checksum of all requests so far. A rank that has waited for a while writes
number and checksum to the group's store and reads what others have written. If a number is the same and the checksum is
not, the ranks have made different calls. An entry stays true, so nothing must be taken back, and ranks that only wait
for a long time are never accused.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch._C._distributed_c10d import PrefixStore

__all__ = ["LOOK_S", "Request", "RequestLog"]

LOOK_S = 1.0
"""Seconds of waiting before each look at the other ranks."""
_KEPT = 1 << 16
"""Number of requests whose checksums are kept; ranks are never that far apart."""


@dataclass(frozen=True, slots=True)
class Request:
    """A collective that this rank has requested."""

    number: int
    checksum: int
    """Checksum of all requests up to this one."""
    what: str


class RequestLog:
    """The requests of a rank, in order."""

    def __init__(self) -> None:
        self.number = 0
        self.checksum = 0
        self._checksums: deque[int] = deque(maxlen=_KEPT)

    def add(self, what: str) -> Request:
        """Note one more collective."""
        self.checksum = zlib.crc32(what.encode(), self.checksum)
        self._checksums.append(self.checksum)
        self.number += 1
        return Request(self.number, self.checksum, what)

    def differs_at(self, number: int, checksum: int) -> bool:
        """Return whether another rank's checksum at a number shows that it made other calls; False if unknown."""
        back = self.number - number
        return 0 <= back < len(self._checksums) and self._checksums[-1 - back] != checksum

    def find_divergence(self, request: Request, store: PrefixStore, rank: int, peers: Sequence[int]) -> str | None:
        """Write what this rank waits for, and check what the others wait for.

        Args:
            request: the request that the rank waits for.
            store: the group's store.
            rank: this rank.
            peers: the other ranks that it waits for.

        Returns:
            The ranks that will not come and the reason; None if none are known.
        """
        store.set(f"wait {rank}", f"{request.number} {request.checksum} {request.what}")
        for peer in peers:
            if store.check([f"cause {peer}"]):
                return str(store.get(f"cause {peer}").decode())
            if not store.check([f"wait {peer}"]):
                continue
            number, checksum, what = store.get(f"wait {peer}").decode().split(" ", 2)
            if self.differs_at(int(number), int(checksum)):
                return f"rank {peer} is in the {what}"
        return None
