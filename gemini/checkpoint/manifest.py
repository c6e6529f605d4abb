"""What a checkpoint consists of: the last file to be written, and the first to be read. Pure but for the parsing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemini.errors import CheckpointError

__all__ = [
    "FileRecord",
    "Manifest",
    "ParamRecord",
    "Piece",
    "entry_name",
    "find_pieces",
    "run_state_name",
    "weights_name",
]

FORMAT = "gemini-checkpoint"
VERSION = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
MAX_COUNT = 2**63 - 1
MAX_NUM_DIMS = 64
"""As in torch."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a parameter's elements, in row-major order, in one file."""

    begin: int
    end: int
    checksums: dict[str, int]
    """CRC-32 of what is kept of these elements, by kind."""


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
    kinds: tuple[str, ...]
    """What is kept of it: "master", "exp_avg", "exp_avg_sq", all float32; or "weight" of a frozen one."""

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
            version = _count(document["version"])
            if version < 1:
                raise ValueError(f"version is {version}")
            if version > VERSION:
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
    params = {name: _param_of(fields) for name, fields in body["params"].items()}
    files = {name: _file_of(name, fields, params) for name, fields in body["files"].items()}
    manifest = Manifest(_count(body["step"]), _count(body["world_size"]), params, files)
    for name, param in params.items():
        find_pieces(manifest, name, 0, param.numel)
    return manifest


def _param_of(fields: Mapping[str, Any]) -> ParamRecord:
    if len(fields["shape"]) > MAX_NUM_DIMS:
        raise ValueError(f"{len(fields['shape'])} dimensions")
    return ParamRecord(tuple(map(_count, fields["shape"])), tuple(map(str, fields["kinds"])))


def _file_of(name: str, fields: Mapping[str, Any], params: Mapping[str, ParamRecord]) -> FileRecord:
    if _FILE_NAME.fullmatch(name) is None:
        raise ValueError(f"file name {name!r}")
    pieces = {}
    for param, piece in fields["pieces"].items():
        begin, end = _count(piece["begin"]), _count(piece["end"])
        checksums = {kind: _count(value) for kind, value in piece["checksums"].items()}
        if not begin <= end <= params[param].numel or set(checksums) != set(params[param].kinds):
            raise ValueError(f"elements {begin} to {end} of {param}")
        pieces[param] = Piece(begin, end, checksums)
    checksum = fields["checksum"]
    return FileRecord(_count(fields["nbytes"]), None if checksum is None else _count(checksum), pieces)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"expected a number from 0 to {MAX_COUNT}, got {str(value)[:40]!r}")
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
    place = begin
    for i, piece in enumerate(pieces):
        if piece.begin > place or (i and piece.begin < place):
            return False
        place = piece.end
    return place >= end


def weights_name(rank: int) -> str:
    """Return the name of a rank's file of parameters."""
    return f"rank-{rank:05d}.safetensors"


def run_state_name(rank: int) -> str:
    """Return the name of a rank's file of everything else."""
    return f"rank-{rank:05d}.pt"


def entry_name(kind: str, param: str) -> str:
    """Return a tensor's name in a rank's file of parameters."""
    return f"{kind}.{param}"
