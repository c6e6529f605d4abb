"""One client's connection in the service's event loop. Knows packets and messages, not what they mean."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from gemini.service.messages import (
    ClientMessage,
    MalformedMessageError,
    ServiceMessage,
    decode_client_message,
    encode_message,
)
from gemini.service.packets import (
    BadPacketError,
    close_all,
    peer_credentials,
    receive_packet,
    send_packet,
)

__all__ = ["Connection", "MessageHandler", "ProtocolError"]

logger = logging.getLogger(__name__)

MAX_UNSENT_PACKETS = 256
"""Maximum number of unread answers; a client that reads none of them is disconnected."""
MAX_PACKETS_PER_TURN = 16
"""Maximum number of packets that one client has handled before other clients get their turn."""
MAX_LAST_PACKETS = 1024
"""Maximum number of packets read from a process that has died; Linux keeps no more for a socket by default."""

MessageHandler: TypeAlias = Callable[[ClientMessage, tuple[int, ...]], None]
"""Function that handles a message and its descriptors, which it closes; raises ProtocolError to end the connection."""


class ProtocolError(Exception):
    """A client violates the protocol."""


class Connection:
    """Receives a client's messages and sends it others, until either side ends the connection.

    The end is noticed on the socket and by the process: a forked child of the client may hold the socket open for
    longer.

    Args:
        connected: SOCK_SEQPACKET socket; this object closes it.
        on_message: called for each message.
        on_end: called once, when the connection has ended for any reason.
    """

    def __init__(self, connected: socket.socket, on_message: MessageHandler, on_end: Callable[[], None]) -> None:
        connected.setblocking(False)
        # - The client
        self.peer = peer_credentials(connected)
        self.process: int | None = None
        """Descriptor of the peer's process (pidfd); None if the process cannot be seen from here."""
        # - What has happened
        self.num_received = 0
        self.is_closed = False
        self.is_malformed = False
        """Whether the connection was ended because a packet was malformed."""
        # - What carries messages
        self._socket = connected
        self._on_message, self._on_end = on_message, on_end
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connected, self._receive)
        try:
            self.process = os.pidfd_open(self.peer.pid)
            self._loop.add_reader(self.process, self._receive_last)
        except OSError as error:
            logger.debug("process %d of a client cannot be watched: %s", self.peer.pid, error)

    def send(self, message: ServiceMessage, descriptors: tuple[int, ...] = ()) -> None:
        """Send a message, now or when the client has read earlier ones; do nothing if the connection has ended.

        Args:
            message: the message to send.
            descriptors: file descriptors to send with it; the caller keeps its own.
        """
        if self.is_closed:
            return
        self._unsent.append((encode_message(message), tuple(os.dup(each) for each in descriptors)))
        if len(self._unsent) > MAX_UNSENT_PACKETS:
            logger.warning("a client (process %d) reads no answers; its connection is ended", self.peer.pid)
            self.close()
        elif len(self._unsent) == 1:
            self._send_unsent()

    def close(self) -> None:
        """End the connection. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for _, descriptors in self._unsent:
            close_all(descriptors)
        self._unsent.clear()
        self._on_end()
        if self.process is not None:
            self._loop.remove_reader(self.process)
            os.close(self.process)
            self.process = None

    def receive_now(self) -> None:
        """Handle packets that arrived but are unread; limited, because a child of a dead client may keep sending."""
        for _ in range(MAX_LAST_PACKETS):
            if self.is_closed or not self._receive_one():
                return

    def _receive(self) -> None:
        for _ in range(MAX_PACKETS_PER_TURN):
            if self.is_closed or not self._receive_one():
                return

    def _receive_last(self) -> None:
        """Read what the dead process sent before its end, and close."""
        self.receive_now()
        self.close()

    def _receive_one(self) -> bool:
        try:
            packet = receive_packet(self._socket)
            if not packet.payload:
                close_all(packet.descriptors)
                self.close()
                return False
            self.num_received += 1
        except BlockingIOError:
            return False
        except (BadPacketError, OSError) as error:
            self._refuse(error)
            return False
        try:
            self._handle(packet.payload, packet.descriptors)
        except (ProtocolError, MalformedMessageError, OSError) as error:
            self._refuse(error)
        except Exception:
            logger.exception(
                "a message of process %d (user %d) caused an internal error", self.peer.pid, self.peer.user
            )
            self.close()
        return True

    def _refuse(self, error: Exception) -> None:
        # Logged at a low level: anyone who may connect could fill the log.
        logger.debug("the connection of process %d (user %d) is ended: %s", self.peer.pid, self.peer.user, error)
        self.is_malformed = True
        self.close()

    def _handle(self, payload: bytes, descriptors: tuple[int, ...]) -> None:
        try:
            message = decode_client_message(payload)
        except MalformedMessageError:
            close_all(descriptors)
            raise
        self._on_message(message, descriptors)

    def _send_unsent(self) -> None:
        try:
            while self._unsent:
                payload, descriptors = self._unsent[0]
                send_packet(self._socket, payload, descriptors)
                close_all(descriptors)
                self._unsent.popleft()
            self._loop.remove_writer(self._socket)
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._send_unsent)
        except OSError:  # the peer is gone; what it sent before must still be read
            self._loop.remove_writer(self._socket)
