"""Measures how long training steps take."""

from __future__ import annotations

import statistics
import time
from collections import deque

__all__ = ["StepClock"]

MAX_TIMED_STEPS = 16
"""Newest steps whose median is the measured time of a step."""


class StepClock:
    """Times steps from the start of forward to the end of the update; the first, which is traced, does not count."""

    def __init__(self) -> None:
        self._began_s = 0.0
        self._seconds: deque[float] = deque(maxlen=MAX_TIMED_STEPS)
        self._num_steps = 0

    @property
    def step_s(self) -> float | None:
        """Median seconds of the newest steps; None before two."""
        return statistics.median(self._seconds) if self._seconds else None

    def begin_step(self) -> None:
        """Note the start of a step."""
        self._began_s = time.perf_counter()

    def end_step(self) -> None:
        """Note its end."""
        self._num_steps += 1
        if self._num_steps > 1:
            self._seconds.append(time.perf_counter() - self._began_s)
