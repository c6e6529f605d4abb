"""Signals that ask a run to stop: the current step ends, and there is time to save."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch

from gemini.errors import ConfigError
from gemini.runtime.runtime import Runtime

__all__ = ["StopOnSignals"]

REPEATED_S = 1.0
"""Seconds in which a second signal is taken for the first."""


class Engine(Protocol):
    """The part of a GeminiDDP that StopOnSignals uses."""

    @property
    def runtime(self) -> Runtime:
        """Its state."""


class StopOnSignals:
    """Remembers a signal until it is queried between two steps; a context manager.

    With several ranks, a signal counts when all ranks know of it, in the same call of `should_stop`; until then
    `received` is None on each rank, so that none stops alone.

    Inside the context, the first SIGTERM or SIGINT (Ctrl-C) is remembered. A signal more than a second later has its
    usual effect: it ends or interrupts the process at once. A signal within a second counts as the same one, because a
    terminal and torchrun send it twice. A signal that `should_stop` did not report is raised when the context ends.

    Args:
        engine: the GeminiDDP whose training is to be stopped, on all its ranks.
        signals: the signals to remember.

    Raises:
        ConfigError: entered in a thread other than the main one, where Python cannot handle signals.
    """

    def __init__(self, engine: Engine, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._engine = engine
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self._received = 0
        self._received_s = 0.0
        self._agreed = 0
        self._is_told = False

    def should_stop(self) -> bool:
        """Return whether a signal has come; with several ranks all call, and agree: on some rank."""
        sharding = self._engine.runtime.sharding
        if not self._agreed:  # one that comes while ranks exchange theirs is for the next call
            received = sharding.group.gather_values(torch.tensor([self._received]), name="signals")
            self._agreed = int(received.max())
            self._remember_once(self._agreed)
        self._is_told = self._agreed != 0
        return self._is_told

    @property
    def received(self) -> signal.Signals | None:
        """The signal that has come; with several ranks, the one that `should_stop` has spoken of."""
        found = self._received if self._engine.runtime.sharding.is_alone else self._agreed
        self._is_told |= found != 0
        return signal.Signals(found) if found else None

    def forget(self) -> None:
        """Drop a signal that came after there was anything left to stop; it is not raised."""
        self._is_told = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received and time.monotonic() - self._received_s > REPEATED_S:
            self._restore()
            signal.raise_signal(number)
        self._remember_once(number)

    def _remember_once(self, number: int) -> None:
        if number and not self._received:
            self._received, self._received_s = number, time.monotonic()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's
        self._before.clear()

    def __enter__(self) -> StopOnSignals:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("StopOnSignals: expected the main thread: Python handles signals in no other")
        if self._before:
            raise ConfigError("StopOnSignals: it has been entered already")
        self._received, self._agreed, self._is_told = 0, 0, False
        try:
            for number in self._signals:
                self._before[number] = signal.signal(number, self._remember)
        except (OSError, TypeError, ValueError) as error:
            self._restore()
            raise ConfigError(f"StopOnSignals: signals: {number!r} cannot be handled: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if error is None and self._received and not self._is_told:
            signal.raise_signal(self._received)
