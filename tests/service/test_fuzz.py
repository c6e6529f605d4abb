"""Anything may come over the socket: the service neither ends nor leaks, and others notice nothing.

For longer than the tests do:  python tests/service/test_fuzz.py --packets 500000 --seed 1
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from patience import PATIENCE_S
from service_process import MIB, ServiceProcess, running_service, wait_until

from gemini.service.messages import (
    MAX_PACKET_NBYTES,
    PROTOCOL_VERSION,
    ClientMessage,
    Drain,
    Evict,
    FindShared,
    Hello,
    Visit,
    encode_message,
)
from gemini.service.packets import BadPacketError, close_all, receive_packet, send_packet

pytestmark = pytest.mark.processes

NUM_PACKETS = 3000
TYPES = [each for each in get_args(ClientMessage) if each not in (Drain, Evict)]
"""Those two do what they say, to the service and to this process; they come as rubbish only."""


def any_value(choose: random.Random, name: str, kind: Any) -> Any:
    """Return a value for a message's field, mostly a sensible one."""
    if name == "version":
        return PROTOCOL_VERSION
    if name == "num_ranks":
        return choose.choice([1, 1, 1, 2, 3])
    text = str(kind)
    if "dict" in text:
        return {choose.choice("xyz"): choose.choice([MIB, 2 * MIB]) for _ in range(choose.randrange(3))}
    if "bytes'" in text:
        return choose.randbytes(choose.randrange(64))
    if "str" in text:
        return choose.choice(["a", "b", "x", "y", "digest", "gemini-lease-0-0123456789abcdef.swap"])
    if "bool" in text:
        return choose.random() < 0.5
    if "nbytes" in name:
        return choose.choice([0, 1, 4096, MIB, 8 * MIB, 40 * MIB, 1 << 40])
    return choose.choice([0, 0, 0, 1, 2, 3, choose.randrange(200)])


def any_message(choose: random.Random) -> bytes:
    kind = choose.choice(TYPES)
    fields = {field.name: any_value(choose, field.name, field.type) for field in msgspec.structs.fields(kind)}
    return encode_message(kind(**fields))


def any_packet(choose: random.Random) -> bytes:
    """Return a message, a damaged message, or rubbish."""
    way = choose.random()
    if way < 0.75:
        return any_message(choose)
    if way < 0.8:
        return b"\x91" * choose.randrange(1, 40_000)  # arrays in arrays
    if way < 0.82:
        return bytes(choose.choice([MAX_PACKET_NBYTES - 1, MAX_PACKET_NBYTES, MAX_PACKET_NBYTES + 1]))
    if way < 0.9:
        return choose.randbytes(choose.randrange(1, 300))
    damaged = bytearray(any_message(choose))
    for _ in range(choose.randrange(1, 4)):
        damaged[choose.randrange(len(damaged))] = choose.randrange(256)
    return bytes(damaged[: choose.randrange(1, len(damaged) + 1)])


class Attacker:
    """A connection that says anything."""

    def __init__(self, service: ServiceProcess, choose: random.Random) -> None:
        self.choose = choose
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(service.socket))
        self.socket.setblocking(False)
        if choose.random() < 0.9:
            job = Hello(PROTOCOL_VERSION, choose.choice("abcdef"), 0, choose.choice([1, 1, 2]), 0)
            self.send(encode_message(job if choose.random() < 0.9 else Visit(PROTOCOL_VERSION)))

    def send(self, packet: bytes, descriptors: tuple[int, ...] = ()) -> bool:
        """Send and take what comes; return whether the connection lasts."""
        try:
            send_packet(self.socket, packet, descriptors)
            while self.choose.random() < 0.8:
                answer = receive_packet(self.socket)
                close_all(answer.descriptors)
                if not answer.payload:
                    return False
        except BlockingIOError:
            pass
        except (OSError, BadPacketError):
            return False
        return True

    def act(self) -> bool:
        descriptors: list[int] = []
        if self.choose.random() < 0.1:
            descriptors = [self.any_descriptor() for _ in range(self.choose.randrange(1, 5))]
        try:
            return self.send(any_packet(self.choose), tuple(descriptors)) and self.choose.random() < 0.97
        finally:
            close_all(descriptors)

    def any_descriptor(self) -> int:
        if self.choose.random() < 0.5:
            descriptor = os.memfd_create("any", os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, self.choose.choice([0, 4096, MIB]))
            return descriptor
        return os.open(self.choose.choice(["/dev/null", "/dev/zero", "/"]), os.O_RDONLY)


def attack(service: ServiceProcess, *, num_packets: int, seed: int) -> None:
    """Let attackers come, act and go."""
    choose = random.Random(seed)
    attackers: list[Attacker] = []
    with service.client("honest") as honest:
        for number in range(num_packets):
            if len(attackers) < 12:
                attackers.append(Attacker(service, choose))
            attacker = choose.choice(attackers)
            if not attacker.act():
                attacker.socket.close()
                attackers.remove(attacker)
            if number % 50 == 0:
                assert honest.budget().host_total == 64 * MIB
        assert honest.is_connected
    for attacker in attackers:
        attacker.socket.close()


def check(*, num_packets: int, seed: int) -> None:
    """Attack a service of its own."""
    with running_service("--warm", "0", "--grace", "0") as service:
        attack(service, num_packets=min(num_packets // 3, 20_000), seed=seed)  # what is allocated once has been
        wait_until(lambda: service.holds_nothing() and not service.state().shared)
        descriptors, resident = service.num_descriptors(), service.resident_nbytes()
        attack(service, num_packets=num_packets, seed=seed + 1)
        wait_until(lambda: service.holds_nothing() and not service.state().shared)
        wait_until(lambda: service.num_descriptors() <= descriptors)
        assert service.resident_nbytes() < resident + 4e6
        assert "Traceback" not in service.terminate()


@pytest.mark.slow
def test_nothing_that_comes_over_the_socket_ends_the_service_or_leaks():
    check(num_packets=NUM_PACKETS, seed=0)


def test_a_client_that_reads_nothing_is_cut_off(service):
    deaf = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    deaf.connect(str(service.socket))
    deaf.settimeout(PATIENCE_S)
    send_packet(deaf, encode_message(Hello(PROTOCOL_VERSION, "deaf", 0, 1, 0)))

    def is_cut_off() -> bool:
        try:
            for _ in range(100):
                send_packet(deaf, encode_message(FindShared(id=1, key="x", nbytes=4096)))
        except (BrokenPipeError, ConnectionResetError):
            return True
        return False

    wait_until(is_cut_off)
    deaf.close()
    wait_until(service.holds_nothing)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packets", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    check(num_packets=chosen.packets, seed=chosen.seed)
    print(f"{chosen.packets} packets, no crash, no leak")
