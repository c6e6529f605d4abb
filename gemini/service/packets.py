"""Packets with descriptors over a Unix socket, and the peer's credentials. Knows no messages."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gemini.service.messages import MAX_PACKET_NBYTES

__all__ = [
    "BadPacketError",
    "Packet",
    "PeerCredentials",
    "close_all",
    "peer_credentials",
    "receive_packet",
    "send_packet",
]

MAX_DESCRIPTORS = 2
"""Maximum number of descriptors with one packet."""
_CREDENTIALS = struct.Struct("iII")
_DESCRIPTOR_NBYTES = array.array("i").itemsize


class BadPacketError(Exception):
    """A packet is longer, or carries more descriptors, than the protocol allows."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One received packet."""

    payload: bytes
    """Content; empty if the peer has ended the connection."""
    descriptors: tuple[int, ...]
    """Descriptors, which this process now owns and must close."""


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Identity of the peer when it connected."""

    pid: int
    """Process id; 0 if the process cannot be seen from here, for example in another container."""
    user: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Return the peer's credentials, which the kernel reports."""
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(option)
    return PeerCredentials(pid=pid, user=user)


def send_packet(connection: socket.socket, payload: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one packet, complete or not at all.

    Args:
        connection: SOCK_SEQPACKET socket.
        payload: 1 to `MAX_PACKET_NBYTES` bytes.
        descriptors: descriptors of open files to send; the caller keeps its own.

    Raises:
        OSError: the peer is gone (BrokenPipeError) or a non-blocking socket is full (BlockingIOError).
    """
    ancillary = []
    if descriptors:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors)))
    connection.sendmsg([payload], ancillary, socket.MSG_NOSIGNAL)


def receive_packet(connection: socket.socket) -> Packet:
    """Receive one packet.

    Args:
        connection: SOCK_SEQPACKET socket.

    Returns:
        The packet; its descriptors close on exec.

    Raises:
        BadPacketError: it is too long or carries too many descriptors; the received descriptors are closed.
        OSError: no packet is there (BlockingIOError), or the connection is broken.
    """
    room = socket.CMSG_SPACE(MAX_DESCRIPTORS * _DESCRIPTOR_NBYTES)
    payload, ancillary, flags, _ = connection.recvmsg(MAX_PACKET_NBYTES, room, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) // _DESCRIPTOR_NBYTES * _DESCRIPTOR_NBYTES
            descriptors += array.array("i", content[:whole])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors) > MAX_DESCRIPTORS:
        close_all(descriptors)
        raise BadPacketError(
            f"expected at most {MAX_PACKET_NBYTES} bytes and {MAX_DESCRIPTORS} descriptors in a packet, got more"
        )
    return Packet(payload, tuple(descriptors))


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for each in descriptors:
        os.close(each)
