"""Who has gone another way is found by what was asked for, never by how long it takes."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from zero.request_log import RequestLog
from zero.torch_group import has_ended


def log_of(*names: str) -> RequestLog:
    log = RequestLog()
    for name in names:
        log.add(name)
    return log


def look(log: RequestLog, request: object, store: dist.Store, rank: int) -> str | None:
    return log.find_divergence(request, store, rank, [1 - rank])  # type: ignore[arg-type]


def test_ranks_that_have_asked_for_the_same_are_not_accused_however_long_they_wait() -> None:
    store = dist.HashStore()
    ahead, behind = log_of("a", "b"), log_of("a")
    ahead_at, behind_at = ahead.add("c"), behind.add("b")
    for _ in range(3):
        assert look(ahead, ahead_at, store, 0) is None
        assert look(behind, behind_at, store, 1) is None
    assert look(behind, behind.add("c"), store, 1) is None


def test_whoever_can_tell_says_so_and_the_other_hears_of_it() -> None:
    store = dist.HashStore()
    first, second = log_of("a"), log_of("a")
    first_at, second_at = first.add("state"), second.add("chunk 3")
    second.add("chunk 4")
    assert look(first, first_at, store, 0) is None  # nothing is written yet
    assert look(second, second_at, store, 1) == "rank 0 is in the state"
    assert look(first, first_at, store, 0) == "rank 1 is in the chunk 3"


def test_one_that_is_ahead_cannot_be_judged_and_judges() -> None:
    store = dist.HashStore()
    behind, ahead = log_of("x"), log_of("y", "z")
    behind_at, ahead_at = behind.add("b"), ahead.add("c")
    assert look(ahead, ahead_at, store, 1) is None
    assert look(behind, behind_at, store, 0) is None
    assert look(ahead, ahead_at, store, 1) == "rank 0 is in the b"
    store.set("cause 1", "rank 1 has failed before")
    assert look(behind, behind_at, store, 0) == "rank 1 has failed before"


def test_a_checksum_that_is_no_longer_kept_proves_nothing() -> None:
    log = log_of("a")
    assert log.differs_at(1, 0)
    assert not log.differs_at(2, 0)
    assert not log.differs_at(-1, 0)


class LateWork:
    """A collective that ends just when a wait for it has given up."""

    def __init__(self, error: str | None) -> None:
        self._error = error

    def wait(self, timeout: timedelta | None = None) -> bool:
        if timeout is not None:
            raise RuntimeError("time is up")
        if self._error is not None:
            raise RuntimeError(self._error)
        return True

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_ends_when_time_is_up_has_not_failed() -> None:
    assert has_ended(LateWork(None), timedelta(seconds=1))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="connection reset"):
        has_ended(LateWork("connection reset"), timedelta(seconds=1))  # type: ignore[arg-type]
