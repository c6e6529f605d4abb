"""The protocol's bytes: small, strict and bounded."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from gemini.service.messages import (
    MAX_META_NBYTES,
    MAX_PACKET_NBYTES,
    AskLease,
    ClientMessage,
    Hello,
    MalformedMessageError,
    MemberRow,
    NodeState,
    ServiceMessage,
    SetMeta,
    SharedRow,
    TierState,
    Waiting,
    decode_client_message,
    decode_service_message,
    encode_message,
)

LONGEST_NAME = "n" * 128


def test_a_message_is_a_map_with_its_type():
    packet = encode_message(Waiting(7, "x"))
    assert packet == b"\x83\xa4type\xa7waiting\xa2id\x07\xa6reason\xa1x"
    assert decode_service_message(packet) == Waiting(7, "x")


@pytest.mark.parametrize("side", [ClientMessage, ServiceMessage])
def test_every_message_has_a_tag_of_its_own(side):
    tags = [each.__struct_config__.tag for each in get_args(side)]
    assert len(set(tags)) == len(tags)


def damaged(**changes):
    fields = {"type": "hello", "version": 1, "job": "job", "rank": 0, "num_ranks": 1, "priority": 0}
    return msgspec.msgpack.encode({name: value for name, value in (fields | changes).items() if value is not None})


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xff",
        b"\x91" * 10_000,
        b"\x81\xa4type\xa3\xff\xff\xff",
        damaged(type="fly"),
        damaged(type=None),
        damaged(job=None),
        damaged(job=""),
        damaged(job="a" * 129),
        damaged(job="a b"),
        damaged(job="\x1b[2J"),
        damaged(job="\u00e4"),
        damaged(job=7),
        damaged(rank=-1),
        damaged(rank=4096),
        damaged(num_ranks=0),
        damaged(priority=101),
        damaged(priority=1.5),
        damaged(more=1),
        damaged() + b"\x00",
    ],
)
def test_anything_else_is_malformed(packet):
    with pytest.raises(MalformedMessageError):
        decode_client_message(packet)


def test_the_message_that_the_others_are_damages_of_is_well_formed():
    assert decode_client_message(damaged()) == Hello(1, "job", 0, 1, 0)


def test_meta_and_keys_are_bounded():
    for message in (
        SetMeta(id=1, lease=1, meta=bytes(MAX_META_NBYTES + 1)),
        AskLease(id=1, host_nbytes=0, disk_nbytes=0, shared={f"key{number}": 1 for number in range(1025)}),
        AskLease(id=1, host_nbytes=-1, disk_nbytes=0, shared={}),
        AskLease(id=1, host_nbytes=1 << 57, disk_nbytes=0, shared={}),
    ):
        packet = encode_message(message)
        with pytest.raises(MalformedMessageError):
            decode_client_message(packet)


def test_the_longest_messages_fit_in_a_packet():
    """encode_message asserts it; these are the ones with most in them."""
    huge = 1 << 56
    tier = TierState(huge, huge, huge, huge, huge)
    member = MemberRow(LONGEST_NAME, huge, 4095, 4096, 1 << 22, "waiting", huge, huge, huge, -100, 1e9, "r" * 300)
    shared = SharedRow(LONGEST_NAME, huge, huge, True, 4096, 1e9)
    state = NodeState(1 << 53, False, False, tier, tier, [member] * 64, [shared] * 64)
    assert MAX_PACKET_NBYTES // 2 < len(encode_message(state)) <= MAX_PACKET_NBYTES
    keys = {f"{number:04}" + "k" * 44: huge for number in range(1024)}
    assert len(encode_message(AskLease(id=1, host_nbytes=huge, disk_nbytes=huge, shared=keys))) < MAX_PACKET_NBYTES
