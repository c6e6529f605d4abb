"""The manifest of a checkpoint, which is written last and read first. Pure except for parsing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemini.errors import CheckpointError

__all__ = [
    "WHOLE",
    "Division",
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
MAX_NUM_PARTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Division:
    """Division of a parameter into equal parts, as by tensor parallelism; the parts are then cut into runs.

    Blocks of its elements, in row-major order, were dealt to the parts in turn.
    """

    num_parts: int
    block_numel: int
    """Elements of a block: the part's extent in the dimension that was divided, times all later extents."""

    def to_parts(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield where elements [begin, end) of the parameter are: a part, and the run in it."""
        for block, low, high in self._blocks(begin, end):
            first = (block // self.num_parts - block) * self.block_numel
            yield block % self.num_parts, low + first, high + first

    def to_whole(self, part: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield which elements of the parameter a part's elements [begin, end) are."""
        for block, low, high in self._blocks(begin, end):
            first = (block * self.num_parts + part - block) * self.block_numel
            yield low + first, high + first

    def _blocks(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Cut a run at the ends of blocks; yield each block's number and what lies in it."""
        for block in range(begin // self.block_numel, -(-end // self.block_numel)):
            yield block, max(begin, block * self.block_numel), min(end, (block + 1) * self.block_numel)


WHOLE = Division(num_parts=1, block_numel=MAX_COUNT)
"""That of a parameter that was not divided."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements, in row-major order, of one part of a parameter, in one file."""

    part: int
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
    division: Division

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def part_numel(self) -> int:
        """Number of elements of each part."""
        return self.numel // self.division.num_parts


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
                f"{source} is damaged or is not a manifest ({type(error).__name__}: {error}); take another checkpoint"
            ) from None


def _manifest_of(body: Mapping[str, Any]) -> Manifest:
    params = {name: _param_of(fields) for name, fields in body["params"].items()}
    files = {name: _file_of(name, fields, params) for name, fields in body["files"].items()}
    manifest = Manifest(_count(body["step"]), _count(body["world_size"]), params, files)
    for name, param in params.items():
        for part in range(param.division.num_parts):
            find_pieces(manifest, name, part, 0, param.part_numel)
    return manifest


def _param_of(fields: Mapping[str, Any]) -> ParamRecord:
    if len(fields["shape"]) > MAX_NUM_DIMS:
        raise ValueError(f"{len(fields['shape'])} dimensions")
    shape = tuple(map(_count, fields["shape"]))
    division = Division(_count(fields["division"]["num_parts"]), _count(fields["division"]["block_numel"]))
    if division.block_numel < 1 or not 1 <= division.num_parts <= MAX_NUM_PARTS:
        raise ValueError(str(division))
    if division.num_parts > 1 and math.prod(shape) % (division.num_parts * division.block_numel):
        raise ValueError(f"{division} of shape {shape}")
    return ParamRecord(shape, tuple(map(str, fields["kinds"])), division)


def _file_of(name: str, fields: Mapping[str, Any], params: Mapping[str, ParamRecord]) -> FileRecord:
    if _FILE_NAME.fullmatch(name) is None:
        raise ValueError(f"file name {name!r}")
    pieces = {}
    for param, piece in fields["pieces"].items():
        part, begin, end = _count(piece["part"]), _count(piece["begin"]), _count(piece["end"])
        checksums = {kind: _count(value) for kind, value in piece["checksums"].items()}
        record = params[param]
        if part >= record.division.num_parts or not begin <= end <= record.part_numel:
            raise ValueError(f"elements {begin} to {end} of part {part} of {param}")
        if set(checksums) != set(record.kinds):
            raise ValueError(f"checksums of {param}")
        pieces[param] = Piece(part, begin, end, checksums)
    checksum = fields["checksum"]
    return FileRecord(_count(fields["nbytes"]), None if checksum is None else _count(checksum), pieces)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"expected a number from 0 to {MAX_COUNT}, got {str(value)[:40]!r}")
    return value


def find_pieces(manifest: Manifest, param: str, part: int, begin: int, end: int) -> list[tuple[str, Piece]]:
    """Find the files that hold some elements of a part of a parameter.

    Args:
        manifest: the checkpoint's.
        param: name of the parameter.
        part: which part.
        begin: first element of it.
        end: one past the last.

    Returns:
        Names of files and what they hold, in the order of the elements.

    Raises:
        ValueError: some are in no file, or in two.
    """
    pieces = ((name, record.pieces[param]) for name, record in manifest.files.items() if param in record.pieces)
    found = [(name, p) for name, p in pieces if p.part == part and p.begin < end and p.end > begin]
    found.sort(key=lambda pair: pair[1].begin)
    if begin < end and not _covers([piece for _, piece in found], begin, end):
        raise ValueError(f"elements of {param} are missing or duplicated")
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
