"""Packets with descriptors over a Unix socket, and what the kernel says of the peer. Knows no messages."""

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
"""Beside one packet."""
_CREDENTIALS = struct.Struct("iII")
_DESCRIPTOR_NBYTES = array.array("i").itemsize


class BadPacketError(Exception):
    """A packet is longer, or brings more descriptors, than the protocol allows."""


@dataclass(frozen=True, slots=True)
class Packet:
    """What came in one piece."""

    payload: bytes
    """Empty: the peer has ended."""
    descriptors: tuple[int, ...]
    """Now this process's, to be closed."""


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Who connected, at the time."""

    pid: int
    """0: a process that cannot be seen from here, as in another container."""
    user: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Return who is at the other end, by the kernel's word."""
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(option)
    return PeerCredentials(pid=pid, user=user)


def send_packet(connection: socket.socket, payload: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one packet, whole or not at all.

    Args:
        connection: SOCK_SEQPACKET.
        payload: 1 to `MAX_PACKET_NBYTES` bytes.
        descriptors: open files to give; the caller keeps its own.

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
        connection: SOCK_SEQPACKET.

    Returns:
        The packet; its descriptors close on exec.

    Raises:
        BadPacketError: it is too long or brings too many descriptors; those that came are closed.
        OSError: nothing is there (BlockingIOError), or the connection is broken.
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
