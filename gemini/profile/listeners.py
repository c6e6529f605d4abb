"""Listeners for the events of an engine."""

from __future__ import annotations

from typing import Protocol

__all__ = ["RunListener", "RunListeners"]


class RunListener(Protocol):
    """Follows what an engine does; called in the thread that does it, and must not touch the engine."""

    def chunk_became(self, chunk_id: int, state: str) -> None:
        """Note that a chunk enters a state; see gemini.chunk.state."""

    def stalled(self, reason: str, chunk_id: int, begin_s: float, end_s: float) -> None:
        """Note that the training thread has waited for a chunk; times are those of time.perf_counter."""

    def updates_begin(self) -> None:
        """Note that a step's updates begin."""

    def step_ended(self) -> None:
        """Note that a step has ended, taken or skipped."""


class RunListeners:
    """Passes events on to all who follow them; without followers an event costs a call."""

    def __init__(self) -> None:
        self._listeners: list[RunListener] = []

    def add(self, listener: RunListener) -> None:
        """Report every event to a listener from now on."""
        self._listeners.append(listener)

    def remove(self, listener: RunListener) -> None:
        """Remove a listener."""
        self._listeners.remove(listener)

    def __len__(self) -> int:
        return len(self._listeners)

    def chunk_became(self, chunk_id: int, state: str) -> None:
        """Report to all listeners; see RunListener."""
        for listener in self._listeners:
            listener.chunk_became(chunk_id, state)

    def stalled(self, reason: str, chunk_id: int, begin_s: float, end_s: float) -> None:
        """Report to all listeners; see RunListener."""
        for listener in self._listeners:
            listener.stalled(reason, chunk_id, begin_s, end_s)

    def updates_begin(self) -> None:
        """Report to all listeners; see RunListener."""
        for listener in self._listeners:
            listener.updates_begin()

    def step_ended(self) -> None:
        """Report to all listeners; see RunListener."""
        for listener in self._listeners:
            listener.step_ended()
