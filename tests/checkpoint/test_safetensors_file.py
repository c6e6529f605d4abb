"""Files that are written piece by piece are the library's, and damaged ones are refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as library

from gemini.errors import CheckpointError, OffloadIOError
from gemini.files.safetensors import SafetensorsReader, SafetensorsWriter, checksum_of, lay_out_tensors

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e8m0fnu,
)  # fmt: skip
TENSORS = {
    "odd": torch.arange(7, dtype=torch.int8),
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
}
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", "a", "b", "__metadata__"])
HEADERS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 100) | st.just(2**70) | st.sampled_from(["F32", "I8", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=8,
)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def write(path: Path, tensors: dict[str, torch.Tensor], numel: int = 4) -> SafetensorsWriter:
    layout = lay_out_tensors({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    writer = SafetensorsWriter(path, layout)
    for name, tensor in reversed(tensors.items()):
        for part in tensor.reshape(-1).split(numel):
            writer.append(name, part)
    writer.close()
    return writer


def is_readable(path: Path) -> bool:
    """Return whether a file is not refused; then everything in it can be read."""
    try:
        with SafetensorsReader(path) as reader:
            values = [reader.read(name) for name in reader.entries]
    except CheckpointError:
        return False
    assert sum(value.nbytes for value in values) <= path.stat().st_size
    return True


def with_header(header: bytes, num_bytes: int = 0) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(num_bytes)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "file"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {**TENSORS, "values": torch.randn(3, 5).to(dtype)}

    write(tmp_path / "file", tensors)

    found = library.load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype
        assert found[name].shape == tensor.shape
        assert bytes_of(found[name]) == bytes_of(tensor)


def test_runs_of_elements_are_read_from_the_librarys_files(tmp_path: Path) -> None:
    library.save_file(TENSORS, tmp_path / "file", metadata={"format": "pt"})

    with SafetensorsReader(tmp_path / "file") as reader:
        assert torch.equal(reader.read("matrix", 4, 11), TENSORS["matrix"].view(-1)[4:11])
        assert torch.equal(reader.read("odd"), TENSORS["odd"])
        assert reader.read("none").shape == (0,)
        assert reader.entries.keys() == TENSORS.keys()


def test_checksums_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    first, second = (write(tmp_path / str(numel), TENSORS, numel) for numel in (1, 100))
    assert first.checksums == second.checksums
    assert first.checksums["matrix"] == checksum_of(TENSORS["matrix"])


def test_a_flipped_bit_of_a_header_is_refused_or_leaves_a_readable_file(path: Path) -> None:
    path.unlink(missing_ok=True)
    write(path, TENSORS)
    data = path.read_bytes()
    num_header_bytes = 8 + int.from_bytes(data[:8], "little")
    for place in range(8 * num_header_bytes):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        is_readable(path)


def test_every_cut_is_found(path: Path) -> None:
    path.unlink(missing_ok=True)
    write(path, TENSORS)
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        assert not is_readable(path)
    path.write_bytes(data + b"\0")
    assert not is_readable(path)


@settings(max_examples=300)
@given(data=st.binary(max_size=100) | st.builds(with_header, st.binary(max_size=60), st.integers(0, 20)))
def test_other_bytes_are_refused(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    is_readable(path)


@settings(max_examples=500)
@given(header=HEADERS, num_bytes=st.integers(0, 100))
def test_other_headers_are_refused_or_readable(header: Any, num_bytes: int, path: Path) -> None:
    path.write_bytes(with_header(json.dumps(header).encode(), num_bytes))
    is_readable(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]},
        {"dtype": "I8", "shape": [True], "data_offsets": [0, 1]},
        {"dtype": "I8", "shape": [1] * 65, "data_offsets": [0, 1]},
        {"dtype": "I8", "shape": [-1, -8], "data_offsets": [0, 8]},
        {"dtype": "I8", "shape": [8], "data_offsets": [-8, 0]},
        {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]},
    ],
)
def test_headers_that_promise_too_much_allocate_nothing(entry: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(with_header(json.dumps({"a": entry}).encode(), 8))
    with pytest.raises(CheckpointError, match="file is damaged: .*; take another checkpoint"):
        SafetensorsReader(tmp_path / "file")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OffloadIOError, match="cannot open .*/nothing: No such file"):
        SafetensorsReader(tmp_path / "nothing")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve_are_written_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(tmp_path / "file", TENSORS)
    assert torch.equal(library.load_file(tmp_path / "file")["matrix"], TENSORS["matrix"])


def test_a_full_drive_shows_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OffloadIOError, match="cannot reserve space for .*/file: No space left"):
        SafetensorsWriter(tmp_path / "file", lay_out_tensors({"a": (torch.float32, (4,))}))
    assert (tmp_path / "file").read_bytes() == b""


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a: torch\.complex128 cannot be written"):
        lay_out_tensors({"a": (torch.complex128, (4,))})


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800"])
def test_a_name_that_the_format_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be a tensor name in a safetensors file"):
        lay_out_tensors({name: (torch.float32, (4,))})


def test_a_layout_says_where_the_tensors_are() -> None:
    layout = lay_out_tensors({"a": (torch.int8, (3,)), "b": (torch.float32, (2, 0)), "c": (torch.float32, (2,))})
    begins = {name: entry.begin - len(layout.header) for name, entry in layout.entries.items()}
    assert begins == {"a": 8, "b": 0, "c": 0}
    assert layout.nbytes == len(layout.header) + 11


def test_a_dtype_of_a_later_format_is_told_from_damage(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}
    (tmp_path / "file").write_bytes(with_header(json.dumps({"a": entry}).encode(), 8))
    with pytest.raises(CheckpointError, match="file: a has dtype F4, expected one of C64, .*: store it as"):
        SafetensorsReader(tmp_path / "file")
