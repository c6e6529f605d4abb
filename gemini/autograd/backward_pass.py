"""The state of a backward pass: running, ended or failed. Knows no gradients."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

import torch

from gemini.autograd.engine_access import is_autograd_thread
from gemini.errors import ModelError

__all__ = ["BackwardPass"]

PATIENCE_S = 1.0
"""Ends a wait for a pass that another thread is still running, which is that thread's mistake."""


class BackwardPass:
    """The last backward pass that an engine has seen.

    Autograd calls back at the end of a pass that succeeds. When a pass fails, it only drops the callback, to which
    nothing else refers: so the callback no longer exists.
    """

    def __init__(self) -> None:
        self.is_open = False
        """Whether a pass has begun and `end` has not been called since."""
        self._callback: weakref.ref[Callable[[], None]] | None = None
        self._thread: int | None = None
        """Thread that runs the pass; None if not known, because only autograd's own threads have been seen."""

    @property
    def is_running(self) -> bool:
        """Whether a pass is running, as far as is known."""
        return self.is_open and not self.has_failed

    @property
    def has_failed(self) -> bool:
        """Whether the open pass has ended without calling back."""
        return self.is_open and self._callback is not None and self._callback() is None

    def ends_as_failed(self) -> bool:
        """Return whether the open pass has failed, and wait a moment for autograd to forget it if that may still come.

        Autograd's device thread, if there is one, is the last to hold the objects of a pass, and releases them only
        after the thread that called backward has got the error. There is nothing to wait for inside a backward, or in a
        pass that its caller ends.
        """
        if self._is_awaited and torch._C._current_graph_task_id() == -1:
            deadline_s = time.monotonic() + PATIENCE_S
            while self._is_awaited and time.monotonic() < deadline_s:
                time.sleep(0.0005)
        return self.has_failed

    @property
    def _is_awaited(self) -> bool:
        """Whether autograd still holds the callback of the open pass."""
        return self.is_open and self._callback is not None and self._callback() is not None

    def join(self, at_end: Callable[[], None]) -> bool:
        """Note that a gradient arrives, either in the open pass or as the first one of a new pass.

        Args:
            at_end: as in `begin`.

        Returns:
            Whether a pass begins.

        Raises:
            ModelError: another thread is running the open pass.
        """
        is_new = not self.is_open
        if is_new:
            self.begin(at_end)
        elif not is_autograd_thread():
            if self._thread not in (None, threading.get_ident()):
                raise ModelError(
                    f"a backward in thread {threading.current_thread().name}, while another thread runs one of "
                    "this GeminiDDP: one thread at a time may use an engine; let threads take turns with a lock"
                )
            self._thread = threading.get_ident()
        return is_new

    def begin(self, at_end: Callable[[], None] | None) -> None:
        """Note that a backward pass has begun.

        Args:
            at_end: called when the pass has succeeded; `begin` must then be called from within the pass. None: the
                caller calls `end`, and knows whether the pass fails.
        """
        self.is_open, self._callback = True, None
        self._thread = None if is_autograd_thread() else threading.get_ident()
        if at_end is None:
            return

        def callback() -> None:
            at_end()

        self._callback = weakref.ref(callback)
        torch.autograd.Variable._execution_engine.queue_callback(callback)

    def end(self) -> None:
        """Note that the pass has ended."""
        self.is_open, self._callback = False, None
