"""The protocol: what clients and the service say to each other, one message a packet, in MessagePack.

A connection begins with `Hello` (a rank of a job) or `Visit` (a program that inspects or administers). The answer is
`Welcome`. Every later client message carries an `id` that the client chooses; the answer repeats it, and `Waiting` may
precede it. Descriptors travel beside the packet (SCM_RIGHTS). docs/service.md has the table. Knows no sockets.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, TypeVar, get_args

import msgspec

__all__ = [
    "MAX_KEYS",
    "MAX_KEY_LENGTH",
    "MAX_META_NBYTES",
    "MAX_NAME_LENGTH",
    "MAX_PACKET_NBYTES",
    "MAX_RANKS",
    "PROTOCOL_VERSION",
    "AdoptEnd",
    "AdoptLease",
    "AdoptShared",
    "AskBudget",
    "AskLease",
    "AskState",
    "Budget",
    "Bye",
    "ClientMessage",
    "Done",
    "Drain",
    "DropKept",
    "EndLease",
    "Evict",
    "FileGiven",
    "FillDone",
    "FindShared",
    "GiveUpFill",
    "Hello",
    "KeepFile",
    "Kept",
    "LeaseGranted",
    "MalformedMessageError",
    "MemberMessage",
    "MemberRow",
    "NodeState",
    "Refused",
    "RefusedKind",
    "ReleaseShared",
    "ServiceMessage",
    "SetMeta",
    "SharedGiven",
    "SharedRow",
    "TakeKept",
    "TierState",
    "Visit",
    "Waiting",
    "Welcome",
    "Withdraw",
    "decode_client_message",
    "decode_service_message",
    "encode_message",
]

PROTOCOL_VERSION = 1
"""Version that both sides speak; a service answers any other one with `Refused(kind="version")`."""
MAX_PACKET_NBYTES = 64 << 10
MAX_NAME_LENGTH = 128
"""Maximum number of characters of a job's name or a digest."""
MAX_META_NBYTES = 16 << 10
MAX_RANKS = 4096
MAX_KEYS = 1024
"""Maximum number of shared chunks that one lease may ask for."""
MAX_KEY_LENGTH = 48
"""Maximum number of characters of a shared chunk's key; `MAX_KEYS` of them fit into a packet."""

Nbytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 56)]
Key: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_KEY_LENGTH, pattern=r"^[!-~]+$")]
"""Key of a shared chunk."""
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""Number of a request or a lease."""
Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_LENGTH, pattern=r"^[!-~]+$")]
"""Name in printable ASCII without spaces, so that it can be shown anywhere."""
Meta: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=MAX_META_NBYTES)]
Rank: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MAX_RANKS)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e7)]


class MalformedMessageError(Exception):
    """A packet is not a message of the protocol."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """I am this rank of this job; the kernel tells the user."""

    version: int
    job: Name
    rank: Rank
    num_ranks: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANKS)]
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)]


class Visit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="visit"):
    """I only inspect or administer."""

    version: int


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every message after the first."""

    id: Number
    """Number that the client chooses; the answer repeats it."""


class AskBudget(Request, frozen=True, tag="ask-budget"):
    """How much memory is there? Answer: `Budget`."""


class AskLease(Request, frozen=True, tag="ask-lease"):
    """Grant this now or later. Answer: `Waiting` any number of times, then `LeaseGranted`."""

    host_nbytes: Nbytes
    disk_nbytes: Nbytes
    shared: Annotated[dict[Key, Nbytes], msgspec.Meta(max_length=MAX_KEYS)]
    """Keys and lengths of the shared chunks that this rank will find; existing ones cost nothing."""


class Withdraw(Request, frozen=True, tag="withdraw"):
    """I no longer want what I asked for, whether or not it was granted. Answer: `Done`."""

    request: Number
    """Number of the `AskLease` or `FindShared`."""


class EndLease(Request, frozen=True, tag="end-lease"):
    """I have given this back. Answer: `Done`."""

    lease: Number


class KeepFile(Request, frozen=True, tag="keep-file"):
    """Make a memory file that outlives me. Answer: `FileGiven` with its descriptor."""

    lease: Number
    """Number of the lease whose host bytes the file is part of."""
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 56)]


class SetMeta(Request, frozen=True, tag="set-meta"):
    """Keep this beside the file. Answer: `Done`."""

    lease: Number
    meta: Meta


class TakeKept(Request, frozen=True, tag="take-kept"):
    """Give me what was kept of my predecessor. Answer: `LeaseGranted` with its files' descriptors."""


class DropKept(Request, frozen=True, tag="drop-kept"):
    """Free what was kept of my predecessor. Answer: `Done`."""


class FindShared(Request, frozen=True, tag="find-shared"):
    """Give me a shared chunk, or the task of filling it. Answer: `SharedGiven` with a descriptor."""

    key: Key
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 56)]


class FillDone(Request, frozen=True, tag="fill-done"):
    """I have filled it, unmapped it and sealed it. Answer: `SharedGiven`, to be read."""

    key: Key
    digest: Name
    """Digest of the content; two keys with one digest become one chunk."""


class GiveUpFill(Request, frozen=True, tag="give-up-fill"):
    """Another client may fill it. Answer: `Done`."""

    key: Key


class ReleaseShared(Request, frozen=True, tag="release-shared"):
    """I no longer use it. Answer: `Done`."""

    key: Key


class AdoptLease(Request, frozen=True, tag="adopt-lease"):
    """An earlier service granted me this. Answer: `LeaseGranted` with another number, or `Refused`.

    Carries the keep file's descriptor, if there is one.
    """

    lease: Number
    """Number that the earlier service gave it."""
    host_nbytes: Nbytes
    disk_nbytes: Nbytes
    disk_name: Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
    meta: Meta


class AdoptShared(Request, frozen=True, tag="adopt-shared"):
    """I use this shared chunk, or am filling it; its descriptor is attached. Answer: `Done`."""

    key: Key
    digest: Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
    """Digest of the content; empty if I am still filling it."""


class AdoptEnd(Request, frozen=True, tag="adopt-end"):
    """That was everything I have from the earlier service. Answer: `Done`."""


class Bye(Request, frozen=True, tag="bye"):
    """I am closing the connection. Answer: `Done`."""

    keep: bool
    """Whether to keep now what would be kept if I were killed."""


class AskState(Request, frozen=True, tag="ask-state"):
    """What does each rank hold? Answer: `NodeState`, a part of it."""

    part: Number
    """Part number, counted from 0 until the last part; what changes in between may appear in none or two of them."""


class Evict(Request, frozen=True, tag="evict"):
    """End this job: ask its processes to end, and later kill them. Answer: `Done` at once."""

    job: Name
    user: Annotated[int, msgspec.Meta(ge=-1, le=1 << 32)]
    """User id; -1 for my own."""
    timeout_s: Seconds


class Drain(Request, frozen=True, tag="drain"):
    """Grant nothing more, wait for the running jobs, then end. Answer: `Done` at once."""

    timeout_s: Seconds | None
    """Seconds after which jobs are evicted; None: never."""


class Kept(msgspec.Struct, frozen=True):
    """Kept state of a rank that died."""

    lease: int
    host_nbytes: int
    disk_nbytes: int
    file_nbytes: int
    meta: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Answer to the first message."""

    version: int
    kept: Kept | None
    """State kept for the same rank of the same job of the same user; None if nothing is kept."""


class Budget(msgspec.Struct, frozen=True, tag="budget"):
    """Answer to `AskBudget`, in bytes."""

    id: int
    host_total: int
    host_free: int
    host_share: int
    disk_total: int
    disk_free: int


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """The request is not granted yet, with the reason."""

    id: int
    reason: str


class LeaseGranted(msgspec.Struct, frozen=True, tag="lease-granted"):
    """Answer to `AskLease`, `TakeKept` and `AdoptLease`, with the descriptors of the disk file and the keep file."""

    id: int
    lease: int
    host_nbytes: int
    disk_nbytes: int
    disk_path: str
    """Path of the disk file; empty if there is none."""
    file_nbytes: int
    """Length of the keep file in bytes; 0 if there is none."""


class FileGiven(msgspec.Struct, frozen=True, tag="file-given"):
    """Answer to `KeepFile`, with a descriptor for reading and writing."""

    id: int


class SharedGiven(msgspec.Struct, frozen=True, tag="shared-given"):
    """Answer to `FindShared` and `FillDone`, with a descriptor, which is read-only if the chunk is filled."""

    id: int
    is_filled: bool
    nbytes: int
    digest: str
    """Digest of the content; empty if the chunk is not filled."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The request was carried out."""

    id: int


RefusedKind: TypeAlias = Literal[
    "never-fits", "full", "conflict", "forbidden", "unknown", "draining", "too-many", "disk", "version"
]
REFUSED_KINDS: tuple[str, ...] = get_args(RefusedKind)


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request was refused."""

    id: int
    kind: RefusedKind
    text: str


class TierState(msgspec.Struct, frozen=True):
    """Bytes of one tier."""

    total: int
    leased: int
    kept: int
    """Bytes kept for dead ranks."""
    shared: int
    warm: int
    """Bytes of shared chunks without users."""


class MemberRow(msgspec.Struct, frozen=True):
    """One rank of a job, as `ps` shows it."""

    job: str
    user: int
    rank: int
    num_ranks: int
    pid: int
    """Process id; 0 if there is none."""
    state: str
    """State: "idle", "waiting", "running", "kept" or "lost" (leased before the service restarted, not seen since)."""
    host_nbytes: int
    disk_nbytes: int
    shared_nbytes: int
    priority: int
    age_s: float
    waits_for: str


class SharedRow(msgspec.Struct, frozen=True):
    """One shared chunk, as `ps` shows it."""

    key: str
    user: int
    nbytes: int
    is_filled: bool
    num_users: int
    idle_s: float


class NodeState(msgspec.Struct, frozen=True, tag="node-state"):
    """A part of the answer to `AskState`."""

    id: int
    is_last: bool
    is_draining: bool
    host: TierState
    disk: TierState
    members: list[MemberRow]
    shared: list[SharedRow]


MemberMessage: TypeAlias = (
    AskBudget
    | AskLease
    | Withdraw
    | EndLease
    | KeepFile
    | SetMeta
    | TakeKept
    | DropKept
    | FindShared
    | FillDone
    | GiveUpFill
    | ReleaseShared
    | AdoptEnd
    | Bye
)
"""Any message of a job's rank that carries no descriptor."""
ClientMessage: TypeAlias = MemberMessage | Hello | Visit | AdoptLease | AdoptShared | AskState | Evict | Drain
ServiceMessage: TypeAlias = (
    Welcome | Budget | Waiting | LeaseGranted | FileGiven | SharedGiven | Done | Refused | NodeState
)

_Message = TypeVar("_Message", ClientMessage, ServiceMessage)
_encoder = msgspec.msgpack.Encoder()
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_service_decoder: msgspec.msgpack.Decoder[ServiceMessage] = msgspec.msgpack.Decoder(ServiceMessage)


def encode_message(message: ClientMessage | ServiceMessage) -> bytes:
    """Return a message's packet.

    Args:
        message: a message of either side.

    Returns:
        At most `MAX_PACKET_NBYTES` bytes, which the messages' own limits guarantee.
    """
    packet = _encoder.encode(message)
    assert len(packet) <= MAX_PACKET_NBYTES, f"{type(message).__name__} of {len(packet)} bytes"
    return packet


def decode_client_message(packet: bytes) -> ClientMessage:
    """Return the client's message in a packet.

    Args:
        packet: the packet as received.

    Returns:
        The message, of the declared types, lengths and ranges.

    Raises:
        MalformedMessageError: the packet is anything else.
    """
    return _decode(_client_decoder, packet)


def decode_service_message(packet: bytes) -> ServiceMessage:
    """Return the service's message in a packet.

    Args:
        packet: the packet as received.

    Returns:
        The message.

    Raises:
        MalformedMessageError: the packet is not a message, for example because the service has another version.
    """
    return _decode(_service_decoder, packet)


def _decode(decoder: msgspec.msgpack.Decoder[_Message], packet: bytes) -> _Message:
    try:
        return decoder.decode(packet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from error
