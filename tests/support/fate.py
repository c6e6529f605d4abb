"""Kills that fall where a process has come, however fast the machine is.

A process counts what Python does in all of its threads: each call of a function, in Python or in C, and each return.
At the one that was drawn for it, it kills itself, whatever its other threads and the native ones are doing; or it tells
its parent, works on and is killed by it a little later, at the end of a step at the latest.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from patience import PATIENCE_S

NOW = "now"


class Fate(NamedTuple):
    """Where a process is killed."""

    at_event: int
    """Calls and returns after it has begun."""
    by_parent: bool = False


class Fated:
    """The process's side; to be made before the threads that count too.

    Args:
        fate: None: nothing happens, and calls and returns are counted.
        tell: tells the parent a word.
        wait: waits for the parent.
    """

    def __init__(
        self, fate: Fate | None, tell: Callable[[Any], object] | None = None, wait: Callable[[], object] | None = None
    ) -> None:
        self._fate, self._tell, self._wait = fate, tell, wait
        self._events: Any = None
        self._is_told = False
        threading.setprofile(self._look)
        sys.setprofile(self._look)

    def begin(self) -> None:
        """Count from here on."""
        self._events = itertools.count(1)

    def end_step(self) -> None:
        """Wait to be killed, if that is due."""
        if self._is_told:
            assert self._wait is not None
            self._wait()
            raise AssertionError("the parent said something")

    def end(self) -> int:
        """Count no more; return the number of calls and returns."""
        sys.setprofile(None)
        events, self._events = self._events, None
        return int(next(events)) - 1

    def _look(self, frame: Any, event: str, argument: Any) -> None:
        if self._events is None or self._is_told:
            return
        if next(self._events) == (0 if self._fate is None else self._fate.at_event):
            assert self._fate is not None
            if not self._fate.by_parent:
                os.kill(os.getpid(), signal.SIGKILL)
            self._is_told = True
            assert self._tell is not None
            self._tell(NOW)


def draw_fate(choose: random.Random, num_events: int) -> Fate:
    """Draw where a process is killed: within its first calls and returns."""
    return Fate(choose.randrange(1, num_events), choose.random() < 0.5)


def receive(connection: Connection) -> Any:
    """Return what a process says next; an EOFError if it has died."""
    assert connection.poll(PATIENCE_S), "the process says nothing"
    return connection.recv()


def end_of(process: BaseProcess, connection: Connection) -> list[Any]:
    """Let a process meet its fate; return what it said before."""
    said: list[Any] = []
    try:
        while (word := receive(connection)) != NOW:
            said.append(word)
        process.kill()
    except (EOFError, ConnectionResetError):
        pass  # by its own hand
    process.join()
    return said
