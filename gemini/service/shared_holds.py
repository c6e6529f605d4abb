"""The shared chunks, their users and their bytes: sums only, no clock and no I/O."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from gemini.service.member import Member

__all__ = ["SharedHold", "SharedHolds", "kept_of"]


@dataclass(slots=True)
class SharedHold:
    """A shared chunk; its bytes are counted once for all its users."""

    nbytes: int
    content: str
    """Name of the content; a user's chunks with the same content are one chunk and count once."""
    holders: set[Member] = field(default_factory=set)
    is_filled: bool = False
    idle_since_s: float = 0.0
    """Time at which the last holder released it, in seconds."""


class SharedHolds:
    """All shared chunks of a node. A chunk without users is *warm*: it stays until its room is needed."""

    def __init__(self) -> None:
        self.holds: dict[tuple[int, str], SharedHold] = {}
        """Chunks by user and key."""

    def adopt(self, member: Member, key: str, nbytes: int, *, is_filled: bool) -> None:
        """Count a rank as a user of a new or existing chunk, whether or not it fits."""
        hold = self.holds.setdefault((member.job.user, key), SharedHold(nbytes, f"key {key}"))
        hold.holders.add(member)
        hold.is_filled |= is_filled

    def fill(self, user: int, key: str, digest: str) -> None:
        """Note that a chunk is filled; another key may have the same content."""
        hold = self.holds[user, key]
        hold.is_filled, hold.content = True, f"digest {digest} {hold.nbytes}"

    def release(self, member: Member, key: str, *, now_s: float) -> None:
        """Stop counting a rank as a user; a filled chunk without users stays warm until its room is needed."""
        hold = self.holds.get((member.job.user, key))
        if hold is not None and member in hold.holders:
            hold.holders.remove(member)
            hold.idle_since_s = now_s

    def drop(self, user: int, key: str) -> None:
        """Forget a chunk."""
        del self.holds[user, key]

    def keep(self, member: Member) -> None:
        """Count a rank's kept state as a user of all filled chunks that the rank uses."""
        for hold in self.holds.values():
            if member in hold.holders and hold.is_filled:
                hold.holders.add(kept_of(member))

    def release_kept(self, member: Member, *, now_s: float) -> None:
        """Stop counting a rank's kept state as a user of chunks."""
        for _, key in list(self.holds):
            self.release(kept_of(member), key, now_s=now_s)

    def kept_nbytes(self, member: Member) -> int:
        """Return the bytes of the chunks that a rank's kept state uses."""
        return sum(hold.nbytes for hold in self.holds.values() if kept_of(member) in hold.holders)

    def has_user(self, member: Member) -> bool:
        """Return whether a rank uses any chunk."""
        return any(member in hold.holders for hold in self.holds.values())

    def unused(self) -> list[tuple[int, str]]:
        """Return user and key of the chunks without users, the longest unused first."""
        unused = [(hold.idle_since_s, where) for where, hold in self.holds.items() if not hold.holders]
        return [where for _, where in sorted(unused)]

    def nbytes(self) -> int:
        """Return the bytes of all chunks, warm ones included."""
        return self._content_nbytes(self.holds)

    def used_nbytes(self, *, wanted: Container[tuple[int, str]] = ()) -> int:
        """Return the bytes of chunks that have users or are wanted."""
        return self._content_nbytes(where for where, hold in self.holds.items() if hold.holders or where in wanted)

    def warm_nbytes(self) -> int:
        """Return the bytes of chunks without users."""
        return self.nbytes() - self.used_nbytes()

    def _content_nbytes(self, chunks: Iterable[tuple[int, str]]) -> int:
        holds = [(user, self.holds[user, key]) for user, key in chunks]
        return sum({(user, hold.content): hold.nbytes for user, hold in holds}.values())


def kept_of(member: Member) -> Member:
    """Return the holder for a rank's kept state, which is separate from the holder for its process."""
    return Member(member.job, -1 - member.rank)
