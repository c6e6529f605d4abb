"""Checks who may use an engine: the process that built it, one thread at a time, until it is closed or broken.

[Note: One thread at a time]
Slots, holds and the trace belong to the one forward that is running. So its thread holds the engine from the start of
the outermost forward, of a unit that is called alone, or of a step, until its end. There is no lock: the claim is one
atomic operation on a dictionary. A second thread is refused and does not wait, because the first may be waiting for it.
Autograd's own threads work for the thread that called backward, and are admitted. The engine's own threads (updates,
saving) take no part in this.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gemini.errors import ModelError

__all__ = ["EngineAccess", "is_autograd_thread"]


class EngineAccess:
    """Refuses threads and processes that may not use an engine; belongs to the process that makes it."""

    def __init__(self) -> None:
        self.is_closed = False
        self._pid = os.getpid()
        self._holder: dict[str, tuple[int, str]] = {}  # at most one entry: the thread and its action

    def check(self, failure: str | None) -> None:
        """Raise ModelError if the engine belongs to the parent of this process, is closed, or lost its state.

        Args:
            failure: the way in which the state was lost; None: it was not.
        """
        if os.getpid() != self._pid:
            raise ModelError(
                "this GeminiDDP belongs to the parent process: a fork has neither its weights nor its threads"
            )
        if self.is_closed:
            raise ModelError("this GeminiDDP has been closed; wrap the model again to go on")
        if failure is not None:
            raise ModelError(
                f"the optimizer state was lost: {failure}; some parameters were updated and some were not, so load a "
                "checkpoint into a new GeminiDDP"
            )

    def claim(self, action: str) -> None:
        """Claim the engine for this thread until `release`; repeated calls change nothing.

        Args:
            action: what the thread is about to do, for messages.

        Raises:
            ModelError: another thread holds it.
        """
        if is_autograd_thread():
            return  # it acts for a thread that waits for it, and could not let go where a recomputation fails
        if not self._is_ours(self._holder.setdefault("thread", (threading.get_ident(), action))):
            self.check_thread(action)
            self._holder["thread"] = (threading.get_ident(), action)  # replaces the entry of a thread that has ended

    def release(self) -> None:
        """Release the engine for other threads. Called from: the thread that claimed it."""
        self._holder.clear()

    @property
    def is_ours(self) -> bool:
        """Whether no other thread holds the engine."""
        holder = self._holder.get("thread")
        return holder is None or self._is_ours(holder)

    def check_thread(self, action: str) -> None:
        """Raise ModelError if another thread holds the engine; `action` is what this one is about to do."""
        holder = self._holder.get("thread")
        if holder is None or self._is_ours(holder):
            return
        other = next((thread for thread in threading.enumerate() if thread.ident == holder[0]), None)
        if other is not None:
            raise ModelError(
                f"{action} in thread {threading.current_thread().name}, while {holder[1]} of the same GeminiDDP "
                f"is under way in thread {other.name}: one thread at a time may use an engine, whose weights are "
                "fetched for one forward; let threads take turns with a lock, or hand their batches to one thread"
            )

    @contextmanager
    def using(self, action: str) -> Iterator[None]:
        """Hold the engine while the context is open, unless this thread already holds it."""
        is_outermost = not self._holder
        self.claim(action)
        try:
            yield
        finally:
            if is_outermost:
                self.release()

    def _is_ours(self, holder: tuple[int, str]) -> bool:
        return holder[0] == threading.get_ident() or is_autograd_thread()


def is_autograd_thread() -> bool:
    """Return whether this is one of autograd's threads, which runs a part of a backward pass."""
    # Python did not start these threads, and represents them by dummy objects.
    is_running_backward = torch._C._current_graph_task_id() != -1
    return is_running_backward and isinstance(threading.current_thread(), threading._DummyThread)
