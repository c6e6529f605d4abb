"""Finds out, while a rank waits, that another has asked for something else and will never come.

Each rank numbers what it asks for and keeps a checksum of all so far. One that has waited for a while writes number and
checksum to the group's store and looks at what others have written: where a number is the same and the checksum is not,
the ranks have gone different ways. What is written stays true, so nothing has to be taken back, and ranks that only
wait for long are never accused.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch._C._distributed_c10d import PrefixStore

__all__ = ["LOOK_S", "Request", "Trail"]

LOOK_S = 1.0
"""Seconds of waiting before each look at the other ranks."""
_KEPT = 1 << 16
"""Requests whose checksums are kept; ranks are never as far apart."""


@dataclass(frozen=True, slots=True)
class Request:
    """A collective that this rank has asked for."""

    number: int
    checksum: int
    """Of all until this one."""
    what: str


class Trail:
    """What a rank has asked for, in order."""

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
        """Return whether another rank's checksum at a number shows that it has gone another way; False if unknown."""
        back = self.number - number
        return 0 <= back < len(self._checksums) and self._checksums[-1 - back] != checksum

    def find_divergence(self, request: Request, store: PrefixStore, rank: int, peers: Sequence[int]) -> str | None:
        """Write what this rank waits for, and look at what the others do.

        Args:
            request: what it waits for.
            store: the group's.
            rank: this one.
            peers: the others it waits for.

        Returns:
            Which of them will not come, and why; None: nothing is known of that.
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
