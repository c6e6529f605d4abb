"""Files written in runs of any length and order hold exactly these bytes, and failures surface."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemini.errors import OffloadIOError
from gemini.files.block_writer import BLOCK_NBYTES, BlockWriter, cut_at_blocks
from gemini.tiers import IO_ALIGNMENT_NBYTES


@given(st.integers(0, 3 * IO_ALIGNMENT_NBYTES), st.integers(0, 3 * BLOCK_NBYTES))
def test_parts_are_the_run_and_all_but_its_ends_are_blocks(offset: int, nbytes: int) -> None:
    parts = list(cut_at_blocks(offset, nbytes))

    assert sum(part.stop - part.start for part in parts) == nbytes
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert all(0 < part.stop - part.start <= BLOCK_NBYTES for part in parts)
    for part in parts[1:-1]:
        assert (offset + part.start) % IO_ALIGNMENT_NBYTES == 0
        assert (part.stop - part.start) % IO_ALIGNMENT_NBYTES == 0
    for part in (parts[0], parts[-1]) if parts else ():
        is_whole = not (offset + part.start) % IO_ALIGNMENT_NBYTES and not (part.stop - part.start) % 4096
        assert is_whole or part.stop - part.start < IO_ALIGNMENT_NBYTES


@pytest.mark.parametrize("length", [1, 1000, 4096, 10_000, 5_000_001])
def test_every_byte_is_where_it_belongs(length: int, tmp_path: Path) -> None:
    nbytes = min(20 * length, 30_000_000)
    expected = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    writer = BlockWriter(tmp_path / "file", nbytes)
    for begin in reversed(range(0, nbytes, length)):
        values = expected[begin : begin + length].clone()
        writer.write(begin, values)
        values.zero_()  # it has been copied
    writer.finish()

    assert (tmp_path / "file").read_bytes() == expected.numpy().tobytes()


def test_a_failed_write_is_raised_in_the_end_at_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemini.files.block_writer._reserve", lambda file, nbytes: None)
    writer = BlockWriter(tmp_path / "file", 40_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        writer.write(0, torch.zeros(40_000, dtype=torch.uint8))
        with pytest.raises(OffloadIOError, match="cannot write .*/file.*File too large"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.abort()
    writer.abort()


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OffloadIOError, match="cannot create .*/file: File exists"):
        BlockWriter(tmp_path / "file", 10)
    assert (tmp_path / "file").read_bytes() == b"mine"
