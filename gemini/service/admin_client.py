"""Inspecting and administering a service from a program that holds nothing there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from gemini.errors import ServiceError
from gemini.service.channel import Channel
from gemini.service.messages import (
    PROTOCOL_VERSION,
    AskState,
    ClientMessage,
    Drain,
    Evict,
    NodeState,
    Refused,
    ServiceMessage,
    Visit,
)

__all__ = ["AdminClient"]


class AdminClient:
    """A connection of a program that holds nothing; a context manager.

    Args:
        path: the service's socket.

    Raises:
        NoServiceError: no service is there.
        ServiceError: it refuses.
    """

    def __init__(self, path: Path) -> None:
        self._channel = Channel(path, Visit(PROTOCOL_VERSION))
        self._channel.is_ending = True  # it holds nothing, so it neither reconnects nor warns

    def state(self) -> NodeState:
        """Return what each rank holds: all of it to root and the service's own user, to other users their own.

        Returns:
            The complete state.

        Raises:
            ServiceError: the connection is lost.
        """
        parts: list[NodeState] = []
        while not parts or not parts[-1].is_last:
            first = len(parts)
            part = self._order(lambda request: AskState(id=request, part=first))  # noqa: B023
            assert isinstance(part, NodeState)
            parts.append(part)
        return msgspec.structs.replace(
            parts[-1],
            members=[row for part in parts for row in part.members],
            shared=[row for part in parts for row in part.shared],
        )

    def evict(self, job: str, *, user: int = -1, timeout_s: float) -> None:
        """End a job: free what is kept of it, ask its processes to end, and kill them after a while.

        Args:
            job: the job's name.
            user: the job's user id; -1: this user's own.
            timeout_s: seconds from SIGTERM to SIGKILL.

        Raises:
            ServiceError: there is no such job, or it is another user's.
        """
        self._order(lambda request: Evict(id=request, job=job, user=user, timeout_s=timeout_s))

    def drain(self, *, timeout_s: float | None) -> None:
        """Make the service grant nothing more and end when no job is left; returns at once.

        Args:
            timeout_s: seconds after which jobs are evicted; None: never.

        Raises:
            ServiceError: this user may not do that.
        """
        self._order(lambda request: Drain(id=request, timeout_s=timeout_s))

    def wait_until_gone(self) -> None:
        """Block until the service ends."""
        self._channel.is_ending = True
        self._channel.wait_lost()

    def _order(self, message_of: Callable[[int], ClientMessage]) -> ServiceMessage:
        request = self._channel.new_id()
        answer, _ = self._channel.ask(request, message_of(request))
        if isinstance(answer, Refused):
            raise ServiceError(answer.text)
        return answer

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
