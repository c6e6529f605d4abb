"""A clock that a test moves, in place of the machine's."""

from __future__ import annotations

import threading
from types import ModuleType

import pytest


class FakeClock:
    """Stands for the module `time` in modules that read it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._lock = threading.Lock()

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Move on, from whichever thread."""
        with self._lock:
            self.now_s += seconds

    def set_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        for module in modules:
            monkeypatch.setattr(module, "time", self)
