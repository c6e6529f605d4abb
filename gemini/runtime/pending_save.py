"""The checkpoint that is being written while training continues, if there is one."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["PendingSave", "UnfinishedSave"]


class UnfinishedSave(Protocol):
    """The parts of a checkpoint being written that the runtime uses."""

    def wait(self) -> Any:
        """Block until it is complete, and release it; raises if it failed."""

    def close(self) -> None:
        """Block until nothing is read any more; raises nothing."""


class PendingSave:
    """Holds at most one unfinished save, which must end before state changes."""

    def __init__(self) -> None:
        self._current: UnfinishedSave | None = None

    def hold(self, save: UnfinishedSave) -> None:
        """Take charge of a save that has begun."""
        assert self._current is None
        self._current = save

    def finish(self) -> None:
        """Wait for the save; one that failed raises, once."""
        if self._current is not None:
            self._current.wait()

    def release(self, save: UnfinishedSave) -> None:
        """Forget a save that has finished reading; its `wait` calls this."""
        if self._current is save:
            self._current = None

    def close(self) -> None:
        """Wait until the save has finished reading, even if it fails."""
        save, self._current = self._current, None
        if save is not None:
            save.close()
