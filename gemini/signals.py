"""Signals that ask a training to stop: the step under way ends, and there is time to save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

import torch

from gemini.ddp import GeminiDDP
from gemini.errors import ConfigError

__all__ = ["StopOnSignals"]


class StopOnSignals:
    """Remembers a signal until training asks for it between two steps; a context manager.

    Inside the context the first SIGTERM or SIGINT (Ctrl-C) is remembered, and what these signals did before comes back:
    a second one ends the process, or interrupts it, at once.

    Args:
        engine: whose training is to be stopped, on all its ranks.
        signals: which to remember.

    Raises:
        ConfigError: entered in another thread than the main one, where Python lets nobody handle signals.
    """

    def __init__(self, engine: GeminiDDP, signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._engine = engine
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self._received = 0

    def should_stop(self) -> bool:
        """Return whether a signal has come; with several ranks all call, and agree: on some rank."""
        sharding = self._engine.runtime.sharding
        if sharding is not None:
            received = sharding.group.gather_values(torch.tensor([self._received]), name="signals")
            self._received = int(received.max())
        return self._received != 0

    @property
    def received(self) -> signal.Signals | None:
        """The signal that has come; of another rank's, after `should_stop` has said so."""
        return signal.Signals(self._received) if self._received else None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's
        self._before.clear()

    def __enter__(self) -> StopOnSignals:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("StopOnSignals: expected the main thread: Python handles signals in no other")
        self._received = 0
        for number in self._signals:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
