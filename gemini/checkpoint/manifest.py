"""What a checkpoint consists of: the last file to be written, and the first to be read. Pure but for the parsing."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemini.errors import CheckpointError

__all__ = [
    "STATE_KINDS",
    "WEIGHT_KIND",
    "FileRecord",
    "Manifest",
    "ParamRecord",
    "Piece",
    "entry_name",
    "find_pieces",
    "state_name",
    "weights_name",
]

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What is kept of a trainable parameter, all float32."""
WEIGHT_KIND = "weight"
"""What is kept of a frozen one, in its working dtype."""
FORMAT = "gemini-checkpoint"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a parameter's elements, in row-major order, in one file."""

    begin: int
    end: int
    checksums: dict[str, int]
    """CRC-32 of what is kept of these elements, by kind: "master", "exp_avg", "exp_avg_sq", or "weight"."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    nbytes: int
    checksum: int | None
    """CRC-32 of the whole file; None where each piece has one."""
    pieces: dict[str, Piece]
    """By parameter name."""


@dataclass(frozen=True, slots=True)
class ParamRecord:
    """One parameter of the model."""

    shape: tuple[int, ...]
    is_trainable: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A complete checkpoint."""

    step: int
    """Optimizer steps taken."""
    world_size: int
    params: dict[str, ParamRecord]
    """By name, the first of tied ones."""
    files: dict[str, FileRecord]
    """By name inside the checkpoint's directory."""

    def to_json(self) -> str:
        """Return the manifest as text, with a checksum of itself."""
        body = json.dumps(dataclasses.asdict(self), separators=(",", ":"))
        return f'{{"format":"{FORMAT}","version":{VERSION},"checksum":{zlib.crc32(body.encode())},"body":{body}}}\n'

    @staticmethod
    def from_json(text: str, *, source: str) -> Manifest:
        """Parse a manifest.

        Args:
            text: what `to_json` returned, or anything at all.
            source: where it comes from, for messages.

        Returns:
            The manifest.

        Raises:
            CheckpointError: it is damaged, no manifest, or of a later version.
        """
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise ValueError(f"format is {document['format']!r}")
            version = document["version"]
            if isinstance(version, int) and version > VERSION:
                raise CheckpointError(
                    f"{source}: version {version} of the format; this version of gemini reads up to {VERSION}: upgrade"
                )
            body = json.dumps(document["body"], separators=(",", ":"))
            if zlib.crc32(body.encode()) != document["checksum"]:
                raise ValueError("the checksum is wrong")
            return _manifest_of(document["body"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{source} is damaged or no manifest ({type(error).__name__}: {error}); take another checkpoint"
            ) from None


def _manifest_of(body: Mapping[str, Any]) -> Manifest:
    params = {
        str(name): ParamRecord(tuple(map(_count, fields["shape"])), bool(fields["is_trainable"]))
        for name, fields in body["params"].items()
    }
    files = {}
    for name, fields in body["files"].items():
        if not isinstance(name, str) or "/" in name or name.startswith("."):
            raise ValueError(f"file name {name!r}")
        pieces = {
            str(param): Piece(
                _count(piece["begin"]),
                _count(piece["end"]),
                {str(kind): _count(value) for kind, value in piece["checksums"].items()},
            )
            for param, piece in fields["pieces"].items()
        }
        checksum = fields["checksum"]
        files[name] = FileRecord(_count(fields["nbytes"]), None if checksum is None else _count(checksum), pieces)
    manifest = Manifest(_count(body["step"]), _count(body["world_size"]), params, files)
    for name, param in params.items():
        find_pieces(manifest, name, 0, param.numel)
    return manifest


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a number of at least 0, got {value!r}")
    return value


def find_pieces(manifest: Manifest, param: str, begin: int, end: int) -> list[tuple[str, Piece]]:
    """Find the files that hold some elements of a parameter.

    Args:
        manifest: the checkpoint's.
        param: name of the parameter.
        begin: first element.
        end: one past the last.

    Returns:
        Names of files and what they hold, in the order of the elements.

    Raises:
        ValueError: some are in no file, or in two.
    """
    found = [
        (name, record.pieces[param])
        for name, record in manifest.files.items()
        if param in record.pieces and record.pieces[param].begin < end and record.pieces[param].end > begin
    ]
    found.sort(key=lambda pair: pair[1].begin)
    if begin < end and not _covers([piece for _, piece in found], begin, end):
        raise ValueError(f"elements of {param} are missing, or there twice")
    return found


def _covers(pieces: Iterable[Piece], begin: int, end: int) -> bool:
    place: int | None = None
    for piece in pieces:
        if place is None:
            if piece.begin > begin:
                return False
        elif piece.begin != place:
            return False
        place = piece.end
    return place is not None and place >= end


def weights_name(rank: int) -> str:
    """Return the name of a rank's file of parameters."""
    return f"rank-{rank:05d}.safetensors"


def state_name(rank: int) -> str:
    """Return the name of a rank's file of everything else."""
    return f"rank-{rank:05d}.pt"


def entry_name(kind: str, param: str) -> str:
    """Return a tensor's name in a rank's file of parameters."""
    return f"{kind}.{param}"
