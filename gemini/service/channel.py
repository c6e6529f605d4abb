"""The client's side of the connection: a background thread receives, any thread sends. Knows messages, not leases.

When the service dies, the thread logs it once, tells callers that wait for an answer, and tries to reconnect every
second.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from gemini.errors import ServiceError
from gemini.service.messages import (
    ClientMessage,
    MalformedMessageError,
    Refused,
    ServiceMessage,
    Waiting,
    Welcome,
    decode_service_message,
    encode_message,
)
from gemini.service.packets import BadPacketError, close_all, receive_packet, send_packet

__all__ = ["Answer", "Channel", "ConnectionLostError", "Descriptors", "Exchange", "NoServiceError"]

logger = logging.getLogger(__name__)

RETRY_S = 1.0
ANSWER_TIMEOUT_S = 30.0
"""Seconds to wait for an answer that the service gives at once."""

Descriptors: TypeAlias = tuple[int, ...]
Answer: TypeAlias = tuple[ServiceMessage, Descriptors]
Exchange: TypeAlias = Callable[[ClientMessage, Sequence[int]], Answer]
"""Sends a message with descriptors and returns the answer; called in the channel's thread while it connects."""


class NoServiceError(ServiceError):
    """No service answers at the address."""


class ConnectionLostError(ServiceError):
    """The connection to the service is lost and not yet restored."""


class Pending:
    """An answer that has not arrived yet.

    Args:
        changed: condition that all answers of a channel share.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.reason = ""
        """Reason why there is no answer yet, in the service's words."""
        self._changed = changed
        self._answer: Answer | None = None
        self._is_lost = self._is_abandoned = False

    def resolve(self, answer: Answer) -> None:
        """Set the answer. Called from: the channel's thread, which holds the condition."""
        if self._is_abandoned:
            close_all(answer[1])
        elif isinstance(answer[0], Waiting):
            self.reason = answer[0].reason
        else:
            self._answer = answer

    def lose(self) -> None:
        """Record that no answer will come. Called from: the channel's thread, which holds the condition."""
        self._is_lost = True

    def abandon(self) -> None:
        """Discard the answer if it ever comes."""
        with self._changed:
            self._is_abandoned = True
            if self._answer is not None:
                close_all(self._answer[1])
                self._answer = None

    def wait(self, timeout_s: float | None, on_wait: Callable[[str], None] | None = None) -> Answer:
        """Wait for the answer and return it; Ctrl-C interrupts this in the main thread.

        Args:
            timeout_s: maximum wait in seconds; None: no limit.
            on_wait: called in this thread with the reason for the wait, each time it changes.

        Returns:
            The message, and its descriptors, which the caller now owns.

        Raises:
            ConnectionLostError: the service died during the wait.
            TimeoutError: the time limit passed.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        told = ""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda told=told: self._answer is not None or self._is_lost or self.reason != told,  # type: ignore[misc]
                    None if until_s is None else max(0.0, until_s - time.monotonic()),
                )
                if self._answer is not None:
                    answer, self._answer = self._answer, None
                    return answer
                if self._is_lost:
                    raise ConnectionLostError("the memory service is gone")
                reason = self.reason
            if until_s is not None and time.monotonic() >= until_s:
                raise TimeoutError(reason)
            told = reason
            if on_wait is not None:
                on_wait(reason)


class Channel:
    """A connection to a service that reconnects when the service returns.

    Args:
        path: the service's socket.
        hello: the first message.
        resume: called in the channel's thread on every connection after the first, before other threads may ask.
        resumed: called in the channel's thread as soon as other threads may ask.

    Raises:
        NoServiceError: no service is there; the message says how to start one.
        ServiceError: the service refuses.
    """

    def __init__(
        self,
        path: Path,
        hello: ClientMessage,
        *,
        resume: Callable[[Exchange], None] | None = None,
        resumed: Callable[[], None] | None = None,
    ) -> None:
        # - What others may see
        self.num_messages = 0
        """Number of messages sent and received since the first connection began."""
        self.is_ending = False
        """Whether the service is expected to end the connection; the end is then not logged."""
        # - How a connection begins
        self._path, self._hello = path, hello
        self._resume, self._resumed = resume, resumed
        # - Answers that are awaited
        self._changed = threading.Condition()
        self._pending: dict[int, Pending] = {}
        """Pending answers by message number. Guarded by: `_changed`."""
        self._last_id = 0
        """Number of the last message. Guarded by: `_changed`."""
        self._is_closed = False
        # - The connection and its thread
        self._process = os.getpid()
        self._socket: socket.socket | None = None
        self._wake_receiver, self._wake_sender = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            connected, self.welcome = self._connect()
        except OSError as error:
            self._close_wake()
            raise NoServiceError(
                f"no memory service answers at unix:{path} ({error.strerror or error}); start one with: "
                f"python -m gemini serve --host-budget BYTES --socket {path}"
            ) from error
        except ServiceError:
            self._close_wake()
            raise
        connected.setblocking(False)
        self._socket = connected
        # The thread ends with the channel, not the other way round; after a fork the child's copy has only descriptors.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget_in_child(reference()))
        self._thread = threading.Thread(target=self._run, name="gemini-service", daemon=True)
        self._thread.start()

    @property
    def is_connected(self) -> bool:
        """Whether the service is connected, as far as is known."""
        return self._socket is not None and not self.is_foreign

    @property
    def is_foreign(self) -> bool:
        """Whether this is a copy in a forked child; such a copy does nothing."""
        return self._process != os.getpid()

    def new_id(self) -> int:
        """Return the number of the next message."""
        with self._changed:
            self._last_id += 1
            return self._last_id

    def begin(self, request: int, message: ClientMessage, descriptors: Sequence[int] = ()) -> Pending:
        """Send a message.

        Args:
            request: the message's `id`.
            message: the message to send.
            descriptors: file descriptors to send with it.

        Returns:
            The pending answer.

        Raises:
            ConnectionLostError: the service is not connected.
        """
        pending = Pending(self._changed)
        with self._changed:
            if self._socket is None or self._is_closed:
                raise ConnectionLostError(f"the memory service at unix:{self._path} is gone; reconnecting every second")
            self._pending[request] = pending
            try:
                self._send(self._socket, message, descriptors)
            except OSError as error:  # the connection's end is about to be noticed
                del self._pending[request]
                raise ConnectionLostError(f"the memory service at unix:{self._path} is gone ({error})") from error
        return pending

    def ask(self, request: int, message: ClientMessage, descriptors: Sequence[int] = ()) -> Answer:
        """Send a message that the service answers at once, and return the answer.

        Args:
            request: the message's `id`.
            message: the message to send.
            descriptors: file descriptors to send with it.

        Returns:
            The message, and its descriptors, which the caller now owns.

        Raises:
            ServiceError: the connection is lost, or the service does not answer.
        """
        pending = self.begin(request, message, descriptors)
        try:
            return pending.wait(ANSWER_TIMEOUT_S)
        except TimeoutError as error:
            pending.abandon()
            raise ServiceError(
                f"the memory service at unix:{self._path} has not answered for {ANSWER_TIMEOUT_S:.0f} s; "
                "check its process"
            ) from error
        except BaseException:
            pending.abandon()
            raise

    def post(self, message: ClientMessage) -> None:
        """Send a message whose answer does not matter; do nothing if the connection is lost."""
        with self._changed:
            if self._socket is not None:
                try:
                    self._send(self._socket, message, ())
                except OSError as error:
                    logger.debug("a message to the memory service is lost: %s", error)

    def wait_connected(self, timeout_s: float | None) -> bool:
        """Wait until the service is connected; return whether it is. Ctrl-C interrupts this in the main thread."""
        with self._changed:
            return self._changed.wait_for(lambda: self._socket is not None or self._is_closed, timeout_s)

    def wait_lost(self) -> None:
        """Wait until the connection is lost. Ctrl-C interrupts this in the main thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._socket is None)

    def close(self) -> None:
        """End the connection and the thread. Idempotent; does nothing in a forked child."""
        if self.is_foreign:
            return
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
        os.write(self._wake_sender, b"x")
        self._thread.join()
        self._close_wake()

    # In the channel's thread

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_receiver, select.POLLIN)
        while not self._is_closed:
            if self._socket is None:
                if not poll.poll(RETRY_S * 1000) and not self.is_ending:
                    self._reconnect()
                continue
            poll.register(self._socket, select.POLLIN)
            poll.poll()
            poll.unregister(self._socket)
            if not self._is_closed and not self._receive(self._socket):
                self._lose()
        self.is_ending = True
        self._lose()

    def _receive(self, connected: socket.socket) -> bool:
        """Receive a packet if there is one; return whether the service is still connected."""
        try:
            packet = receive_packet(connected)
            if not packet.payload:
                return False
            message = decode_service_message(packet.payload)
        except BlockingIOError:
            return True
        except (OSError, BadPacketError, MalformedMessageError) as error:
            logger.debug("the connection to the memory service broke: %s", error)
            return False
        with self._changed:
            self.num_messages += 1
            request = getattr(message, "id", 0)
            keep = isinstance(message, Waiting)
            pending = self._pending.get(request) if keep else self._pending.pop(request, None)
            if pending is None:
                close_all(packet.descriptors)
            else:
                pending.resolve((message, packet.descriptors))
                self._changed.notify_all()
        return True

    def _lose(self) -> None:
        with self._changed:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            for pending in self._pending.values():
                pending.lose()
            self._pending.clear()
            self._changed.notify_all()
        if not self.is_ending:
            logger.warning(
                "the memory service at unix:%s is gone; this process continues with what it has, and looks for "
                "the service",
                self._path,
            )

    def _reconnect(self) -> None:
        try:
            connected, self.welcome = self._connect()
        except (OSError, ServiceError) as error:
            logger.debug("no memory service at unix:%s yet: %s", self._path, error)
            return
        try:
            if self._resume is not None:
                self._resume(lambda message, descriptors: self._exchange(connected, message, descriptors))
        except (OSError, ServiceError) as error:
            logger.debug("the memory service at unix:%s was gone again: %s", self._path, error)
            connected.close()
            return
        logger.warning("the memory service at unix:%s is back", self._path)
        with self._changed:
            connected.setblocking(False)
            self._socket = connected
            self._changed.notify_all()
        if self._resumed is not None:
            self._resumed()

    # Sending and receiving in turn, while a connection begins

    def _connect(self) -> tuple[socket.socket, Welcome]:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connected.settimeout(ANSWER_TIMEOUT_S)
            connected.connect(str(self._path))
            answer, _ = self._exchange(connected, self._hello, ())
            if isinstance(answer, Refused):
                raise ServiceError(f"the memory service at unix:{self._path} refuses: {answer.text}")
            if not isinstance(answer, Welcome):
                raise ServiceError(f"what answers at unix:{self._path} is no memory service of this version")
        except BaseException:
            connected.close()
            raise
        return connected, answer

    def _exchange(self, connected: socket.socket, message: ClientMessage, descriptors: Sequence[int]) -> Answer:
        connected.settimeout(ANSWER_TIMEOUT_S)
        self._send(connected, message, descriptors)
        try:
            while True:
                packet = receive_packet(connected)
                if not packet.payload:
                    raise ConnectionLostError(f"the memory service at unix:{self._path} has ended the connection")
                answer = decode_service_message(packet.payload)
                self.num_messages += 1
                if not isinstance(answer, Waiting):
                    return answer, packet.descriptors
        except (BadPacketError, MalformedMessageError) as error:
            raise ServiceError(f"what answers at unix:{self._path} is no memory service of this version") from error

    def _send(self, connected: socket.socket, message: ClientMessage, descriptors: Sequence[int]) -> None:
        payload = encode_message(message)
        try:
            send_packet(connected, payload, descriptors)
        except BlockingIOError:  # the service is slow
            poll = select.poll()
            poll.register(connected, select.POLLOUT)
            poll.poll(ANSWER_TIMEOUT_S * 1000)
            send_packet(connected, payload, descriptors)
        self.num_messages += 1

    def _close_wake(self) -> None:
        os.close(self._wake_receiver)
        os.close(self._wake_sender)

    def forget(self) -> None:
        """Close a forked child's copies of the descriptors; take no lock, as its owner may not exist in the child."""
        if not self._is_closed:
            if self._socket is not None:
                os.close(self._socket.detach())
                self._socket = None
            self._close_wake()
            self._is_closed = True


def _forget_in_child(channel: Channel | None) -> None:
    if channel is not None:
        channel.forget()
