"""Safetensors files, written and read a run of elements at a time.

The safetensors library is not used here, and only the tests need it. It writes a file from tensors that are all in
memory, and it reads through a mapping, so a failing drive or a truncated file kills the process. The writer here
declares all tensors first, fills them piece by piece and keeps a CRC-32 of each one. The reader checks the header and
every read, and reports damage as CheckpointError. The library can open these files.

Source of the format: https://huggingface.co/docs/safetensors (8 bytes of header length, little-endian; a JSON header;
the tensors' bytes, without gaps).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gemini.errors import CheckpointError, naming_file
from gemini.files.block_writer import BlockWriter

__all__ = [
    "SafetensorsLayout",
    "SafetensorsReader",
    "SafetensorsWriter",
    "TensorEntry",
    "checksum_of",
    "lay_out_tensors",
]

_DTYPES = {
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_NBYTES = 100_000_000
"""Maximum length of a header; the library refuses longer ones."""
_MAX_NUM_DIMS = 64
_MAX_NBYTES = 2**63 - 1
"""Maximum number of bytes of a tensor, as in torch."""
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsLayout:
    """The header of a file, and the places of its tensors."""

    header: bytes
    """First bytes of the file: length of the JSON, and the JSON, padded."""
    entries: Mapping[str, TensorEntry]
    """Places of the tensors, by name."""

    @property
    def nbytes(self) -> int:
        """Length of the file in bytes."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries.values())


def lay_out_tensors(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> SafetensorsLayout:
    """Give each tensor of a file its place; those with large elements come first, so that all are aligned.

    Args:
        tensors: dtype and shape of every tensor, by name.
        metadata: texts by name for the header.

    Returns:
        The layout, its entries in the order of `tensors`.

    Raises:
        CheckpointError: a dtype has no name in the format, or a tensor's name is not allowed.
    """
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    offset = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        if dtype not in _NAMES:
            raise CheckpointError(f"{name}: {dtype} cannot be written to a safetensors file")
        if name == _METADATA or name.encode(errors="replace").decode() != name:
            raise CheckpointError(f"{name!r} cannot be a tensor name in a safetensors file")
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    entries = {
        name: TensorEntry(dtype, shape, base + header[name]["data_offsets"][0])
        for name, (dtype, shape) in tensors.items()
    }
    return SafetensorsLayout(header=len(text).to_bytes(8, "little") + text, entries=entries)


def checksum_of(values: torch.Tensor, before: int = 0) -> int:
    """Return the CRC-32 (zlib's) of a tensor's bytes, going on from that of what came before."""
    return zlib.crc32(_as_bytes(values).numpy().data, before)


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.detach().contiguous().view(-1).view(torch.uint8)


class SafetensorsWriter:
    """Writes one file, each tensor from its start to its end, the tensors in any order.

    Args:
        path: path of the file, which is created; must not exist.
        layout: content of the file.

    Raises:
        OffloadIOError: the file cannot be created or written.
    """

    def __init__(self, path: Path, layout: SafetensorsLayout) -> None:
        self.path = path
        self.checksums = dict.fromkeys(layout.entries, 0)
        """CRC-32 of the written part of each tensor."""
        self._entries = layout.entries
        self._num_written = dict.fromkeys(layout.entries, 0)
        self._file = BlockWriter(path, layout.nbytes)
        try:
            self._file.write(0, torch.frombuffer(bytearray(layout.header), dtype=torch.uint8))
        except BaseException:
            self._file.abort()
            raise

    def append(self, name: str, values: torch.Tensor) -> None:
        """Write the next elements of a tensor.

        Args:
            name: name of the tensor.
            values: contiguous, on the CPU, with the tensor's dtype.
        """
        entry = self._entries[name]
        done = self._num_written[name]
        assert values.dtype is entry.dtype
        assert done + values.numel() <= entry.numel
        self.checksums[name] = checksum_of(values, self.checksums[name])
        self._file.write(entry.begin + done * entry.dtype.itemsize, _as_bytes(values))
        self._num_written[name] = done + values.numel()

    def close(self) -> None:
        """Wait until everything is on the drive."""
        missing = [name for name, entry in self._entries.items() if self._num_written[name] < entry.numel]
        assert not missing, missing
        self._file.finish()

    def abort(self) -> None:
        """Close the file in its present state; idempotent."""
        self._file.abort()


class SafetensorsReader:
    """Reads one file, any part of any tensor.

    Args:
        path: the file.

    Raises:
        OffloadIOError: the file cannot be opened or read.
        CheckpointError: it is not a safetensors file, is shorter or longer than its header says, or has an unknown
            dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming_file("open", path):
            self._file = os.open(path, os.O_RDONLY)
        try:
            nbytes = os.fstat(self._file).st_size
            length = int.from_bytes(self._read_bytes(0, min(8, nbytes)), "little")
            if nbytes < 8 or not 2 <= length <= min(_MAX_HEADER_NBYTES, nbytes - 8):
                raise self._damaged("it is not a safetensors file, or is truncated")
            self.entries = self._parse(self._read_bytes(8, length), 8 + length)
            expected = 8 + length + sum(entry.nbytes for entry in self.entries.values())
            if nbytes != expected:
                raise self._damaged(f"its header promises {expected} bytes, it has {nbytes}")
        except BaseException:
            os.close(self._file)
            raise

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Identity of the file: device, inode, length and time of the last change in nanoseconds.

        This is the inode's time of change. `tar`, `cp -p` and `rsync -t` set the time of modification to any value, and
        a file that replaces a removed one often gets its inode.
        """
        found = os.fstat(self._file)
        return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns

    def _parse(self, text: bytes, base: int) -> dict[str, TensorEntry]:
        """Return the header's tensors; every part of it may be damaged."""
        try:
            header = json.loads(text)
            header.pop(_METADATA, None)
            entries = {}
            for name, fields in header.items():
                begin, end = fields["data_offsets"]
                shape = tuple(fields["shape"])
                if len(shape) > _MAX_NUM_DIMS or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                    raise ValueError(name)
                dtype = _DTYPES.get(fields["dtype"])
                if dtype is None:
                    raise CheckpointError(
                        f"{self.path}: {name} has dtype {fields['dtype']}, expected one of {', '.join(_DTYPES)}: store "
                        "it as one of these, or take another checkpoint"
                    )
                if math.prod(max(extent, 1) for extent in shape) * dtype.itemsize > _MAX_NBYTES:
                    raise ValueError(name)
                entries[name] = TensorEntry(dtype, shape, base + begin)
                if entries[name].nbytes != end - begin:
                    raise ValueError(name)
            end = base
            for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.nbytes)):
                if entry.begin != end:
                    raise ValueError("gap")
                end += entry.nbytes
            return entries
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header cannot be parsed ({type(error).__name__}: {error})") from None

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}; take another checkpoint")

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Read consecutive elements of a tensor.

        Args:
            name: name of the tensor.
            begin: first element, counted in row-major order.
            end: one past the last element; None: the tensor's end.

        Returns:
            The elements, 1D, on the CPU.

        Raises:
            OffloadIOError: the elements cannot be read.
        """
        entry = self.entries[name]
        end = entry.numel if end is None else end
        assert 0 <= begin <= end <= entry.numel
        values = torch.empty(end - begin, dtype=entry.dtype)
        if begin < end:
            self._read_into(entry.begin + begin * entry.dtype.itemsize, _as_bytes(values).numpy().data)
        return values

    def _read_bytes(self, offset: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self._read_into(offset, memoryview(data))
        return bytes(data)

    def _read_into(self, offset: int, data: memoryview) -> None:
        with naming_file("read", self.path):
            while data:
                num_read = os.preadv(self._file, [data], offset)
                if not num_read:
                    raise self._damaged("it was truncated while it was read")
                offset += num_read
                data = data[num_read:]

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
