"""The choice of when updates run, step after step, and the measurements that it is made by."""

from __future__ import annotations

import time
from dataclasses import dataclass

from gemini.placement.overlap import OverlapMode, choose_overlap, smoothed_rate, why_not_ahead
from gemini.update.worker import UpdateWorker

__all__ = ["OverlapChoice", "UpdateTimes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTimes:
    """Seconds since three clocks were started, or between two readings of them."""

    elapsed_s: float
    stall_s: float
    """Training waited for updates."""
    busy_s: float
    """The update thread had something to read, compute or write."""

    def __sub__(self, earlier: UpdateTimes) -> UpdateTimes:
        return UpdateTimes(
            elapsed_s=self.elapsed_s - earlier.elapsed_s,
            stall_s=self.stall_s - earlier.stall_s,
            busy_s=self.busy_s - earlier.busy_s,
        )


class OverlapChoice:
    """Chooses the mode of each step's updates.

    Args:
        asked: the user's mode; None: choose by measurement.
        worker: tells how long updates have taken, and how long training has waited for them.
        has_traffic: whether updates wait for anything but the processor that computes.
        has_spares: whether tiles have spare places to be updated ahead to.
    """

    def __init__(self, asked: OverlapMode | None, worker: UpdateWorker, *, has_traffic: bool, has_spares: bool) -> None:
        self.mode = OverlapMode.OFF if asked is OverlapMode.OFF else OverlapMode.NEXT_FORWARD
        """The mode of the step under way."""
        self.last_step: UpdateTimes | None = None
        """The last step's, from the end of the one before it to its own; None before the second."""
        self._asked = asked
        self._worker = worker
        self._has_traffic = has_traffic
        self._has_spares = has_spares
        self._clip_rate: float | None = None
        self._times_before: UpdateTimes | None = None
        self._choose()

    @property
    def why_not_ahead(self) -> str | None:
        """Why updates do not run ahead of the step although they were asked to."""
        return why_not_ahead(self._asked, has_spares=self._has_spares, clip_rate=self._clip_rate)

    def end_step(self, *, is_clipped: bool) -> None:
        """Learn from a step, taken or skipped, and choose the mode of the next.

        Args:
            is_clipped: whether its gradients were clipped or not finite, so that nothing made ahead could count.
        """
        self._clip_rate = smoothed_rate(self._clip_rate, is_clipped)
        worker = self._worker
        now = UpdateTimes(elapsed_s=time.perf_counter(), stall_s=worker.stall_s, busy_s=worker.busy_s)
        if self._times_before is not None:
            self.last_step = now - self._times_before
        self._times_before = now
        self._choose()

    def _choose(self) -> None:
        last = self.last_step
        self.mode = choose_overlap(
            self._asked,
            has_traffic=self._has_traffic,
            has_spares=self._has_spares,
            clip_rate=self._clip_rate,
            is_speculating=self.mode is OverlapMode.SPECULATIVE,
            stall_s=None if last is None else last.stall_s,
            step_s=None if last is None else last.elapsed_s,
        )
