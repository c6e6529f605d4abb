"""Failures of what ranks do together: how each learns of them, and which rank was the cause.

[Note: When a rank is lost]
Backends report that a connection broke or that time ran out, but not which ranks were missing. So a rank that fails
writes to the group's store what it was waiting for, looks briefly which other ranks on its axis do so, and names the
silent ones. A rank whose peers have all failed before it names these and what they were waiting for. The first failure
stays: every later call raises at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from gemini.errors import CollectiveError, GeminiError
from zero.own_groups import Line, forget
from zero.request_log import Request, RequestLog

__all__ = ["SAME_WAY", "Failures"]

SAME_WAY = (
    "all ranks must run the same units in the same order, also in evaluation, reading (state_dict and the like), "
    "saving and loading"
)
"""What to do about ranks that have asked for different things."""
REPORT_S = 2.0
"""Seconds in which other ranks may report the same failure before they count as silent."""


class Failures:
    """What one group's ranks have asked for so far, and the failure that has ended it.

    Args:
        rank: this rank's number among all processes.
        board: key under which the ranks report failures to each other; the same on all.
        lines: the ranks of each axis.
    """

    def __init__(self, rank: int, board: str, lines: Iterable[Line]) -> None:
        self.board = board
        self._rank = rank
        self._lines = tuple(lines)
        self._request_log = RequestLog()
        self._failure: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether every further call is refused."""
        return self._failure is not None

    def note(self, kind: str, name: str) -> Request:
        """Add a request to the log of requests.

        Args:
            kind: what is done, such as "all-gather".
            name: name of the content.

        Returns:
            The request.

        Raises:
            CollectiveError: something has failed before.
        """
        self.check()
        return self._request_log.add(f"{kind} of {name}")

    def check(self) -> None:
        """Raise CollectiveError if something has failed."""
        if self._failure is not None:
            raise CollectiveError(f"this group has failed before: {self._failure}")

    def look(self, request: Request, line: Line) -> None:
        """Check, while waiting, whether the others will come.

        Args:
            request: what this rank waits for.
            line: the ranks that take part.

        Raises:
            CollectiveError: they will not.
        """
        peers = [rank for rank in line.ranks if rank != self._rank]
        cause = self._request_log.find_divergence(request, self._open_store(), self._rank, peers)
        if cause is not None:
            self.fail(request, f"rank {self._rank} waits for ranks that will not come: {cause}: {SAME_WAY}")

    def fail(self, request: Request, reason: str) -> NoReturn:
        """Refuse further calls, and tell other ranks.

        Args:
            request: what has failed.
            reason: why.

        Raises:
            CollectiveError: always.
        """
        self._failure = f"{request.what}: {reason}"
        self._forget_groups()
        with suppress(RuntimeError):  # the process that holds the store is gone
            store = self._open_store()
            store.set(f"{self._rank}", request.what)
            store.set(f"cause {self._rank}", f"rank {self._rank} has failed before, in the {request.what}")
        raise CollectiveError(self._failure)

    @contextmanager
    def failing(self, request: Request, line: Line) -> Iterator[None]:
        """Turn a backend's error into one that names the request and the ranks.

        Args:
            request: what is done inside the context.
            line: the ranks that take part.

        Yields:
            Nothing.

        Raises:
            CollectiveError: a RuntimeError was raised inside.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, GeminiError):
                raise
            self.check()
            reason = str(error).splitlines()[0].split(". This ")[0]
            cause = self._find_cause(request.what, line)
            self._failure = (
                f"{request.what} failed on rank {self._rank} of {dist.get_world_size()}: {cause}; "
                f"the backend says: {reason}. Start all ranks again, from what was committed or a checkpoint"
            )
            self._forget_groups()
            raise CollectiveError(self._failure) from error

    def close(self) -> None:
        """Refuse further calls, and tell other ranks that this one has left."""
        if self._failure is None:
            self._failure = "it is closed"
            with suppress(RuntimeError, ValueError):  # the process that holds the store, or the group, is gone
                self._open_store().set(f"closed {self._rank}", "")

    def _forget_groups(self) -> None:
        for line in self._lines:
            forget(line)

    def _find_cause(self, what: str, line: Line) -> str:
        """Report a failure to the others through the store; return the ranks of a line that report none."""
        peers = [rank for rank in line.ranks if rank != self._rank]
        try:
            store = self._open_store()
            store.set(f"{self._rank}", what)
            silent = _missing(store, [f"{rank}" for rank in peers])
            closed = [rank for rank in silent if store.check([f"closed {rank}"])]
            if closed:
                cause = f"rank {', '.join(closed)} has closed its engine"
            elif silent:
                cause = f"no response from rank {', '.join(silent)}, which has died or stalled, or waits elsewhere"
            elif peers and not _missing(store, [f"cause {peers[0]}"]):
                cause = store.get(f"cause {peers[0]}").decode()
            else:
                cause = _compare(what, {rank: store.get(f"{rank}").decode() for rank in peers})
            store.set(f"cause {self._rank}", f"rank {self._rank} has failed before, in the {what}: {cause}")
        except RuntimeError:
            return "the process that holds the group's store is gone"
        return cause

    def _open_store(self) -> PrefixStore:
        store = PrefixStore(self.board, dist.distributed_c10d._get_default_store())
        store.set_timeout(timedelta(seconds=REPORT_S))
        return store


def _compare(what: str, others: Mapping[int, str]) -> str:
    """Return why a collective may have failed although all ranks are there, given what each was in."""
    for rank, other in others.items():
        if other != what:
            return f"rank {rank} was in the {other}: all ranks must run the same units in the same order"
    return "a connection was lost, but all ranks are there"


def _missing(store: PrefixStore, keys: Sequence[str]) -> list[str]:
    """Return which keys do not appear in a store within a while."""
    missing = list(keys)
    deadline_s = time.monotonic() + REPORT_S
    while missing and time.monotonic() < deadline_s:
        missing = [key for key in missing if not store.check([key])]
        time.sleep(0.05)
    return missing
