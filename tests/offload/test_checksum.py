"""CRC-32C against RFC 3720, and files whose reads are compared with what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import flip_bit
from hypothesis import given
from hypothesis import strategies as st
from small_resources import random_bytes

from gemini.errors import CorruptRecordError, OffloadIOError
from gemini.offload.checksum import CrcMethod, crc32c
from gemini.offload.io import IoEngine, IoFile, IoOpenFlag, IoOperation, IoRequest, available_backends, empty_aligned

BLOCK = 4096
VECTORS = {
    b"": 0x00000000,
    b"123456789": 0xE3069283,
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(reversed(range(32))): 0x113FDB5C,
}
"""Of RFC 3720, appendix B.4, which writes the bytes of each value in reverse; and the usual check value."""


def has_instruction() -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    return "sse4_2" in flags or "crc32" in flags


METHODS = [CrcMethod.AUTO, CrcMethod.PORTABLE, *([CrcMethod.INSTRUCTION] if has_instruction() else [])]


def tensor_of(content: bytes) -> torch.Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("content", VECTORS)
def test_values_are_those_of_the_standard(method: CrcMethod, content: bytes) -> None:
    assert crc32c(tensor_of(content), method=method) == VECTORS[content]


@given(
    nbytes=st.one_of(st.integers(0, 40), st.sampled_from([1359, 1360, 1361, 4079, 4080, 4081, 4096, 8160, 12_289])),
    skip=st.integers(0, 9),
    cut=st.integers(0, 12_300),
)
def test_methods_agree_at_any_length_address_and_cut(nbytes: int, skip: int, cut: int) -> None:
    content = random_bytes(nbytes + skip, seed=nbytes)[skip:]
    first, second = content[: min(cut, nbytes)], content[min(cut, nbytes) :]
    values = {crc32c(second, crc32c(first, method=a), method=b) for a in METHODS for b in METHODS}
    assert values == {crc32c(content, method=CrcMethod.PORTABLE)}


def test_a_tensor_that_is_not_one_run_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a contiguous CPU tensor"):
        crc32c(torch.zeros(4, 4).t())


# ---------------------------------------------------------------------- files


@pytest.fixture(params=available_backends(), ids=lambda backend: backend.value)
def engine(request: pytest.FixtureRequest) -> Iterator[IoEngine]:
    with IoEngine(request.param, queue_depth=4, num_threads=2) as made:
        yield made


def open_verified(engine: IoEngine, path: Path, num_blocks: int = 64, *, direct: bool = False) -> IoFile:
    flags = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.CREATE
    file = engine.open(path, flags | IoOpenFlag.DIRECT if direct else flags)
    file.verify(num_blocks * BLOCK)
    return file


def aligned(num_blocks: int, seed: int = 0) -> torch.Tensor:
    return empty_aligned(num_blocks * BLOCK, torch.uint8).copy_(random_bytes(num_blocks * BLOCK, seed))


def read_back(file: IoFile, num_blocks: int, first: int = 0) -> torch.Tensor:
    target = empty_aligned(num_blocks * BLOCK, torch.uint8)
    file.read(target, first * BLOCK).wait()
    return target


@pytest.mark.parametrize("direct", [False, True])
def test_what_was_written_passes_however_it_is_cut(engine: IoEngine, tmp_path: Path, direct: bool) -> None:
    file, source = open_verified(engine, tmp_path / "f", direct=direct), aligned(40)
    writes = [file.write(source[first * BLOCK : (first + 8) * BLOCK], first * BLOCK) for first in range(0, 40, 8)]
    for write in writes:
        write.wait()
    for first, count in ((0, 40), (3, 9), (39, 1)):
        assert torch.equal(read_back(file, count, first), source[first * BLOCK : (first + count) * BLOCK])


@pytest.mark.parametrize("position", [0, BLOCK - 1, 5 * BLOCK, 8 * BLOCK - 1])
def test_one_changed_bit_fails_each_read_that_meets_it_and_no_other(
    engine: IoEngine, tmp_path: Path, position: int
) -> None:
    file = open_verified(engine, tmp_path / "f")
    file.write(aligned(8), 0).wait()
    flip_bit(tmp_path / "f", position)
    block = position // BLOCK
    for first, count in ((0, 8), (block, 1)):
        with pytest.raises(CorruptRecordError, match=f"block of 4096 bytes at offset {block * BLOCK} ") as caught:
            read_back(file, count, first)
        assert caught.value.nbytes_done == (block - first) * BLOCK
    for clean in {*range(8)} - {block}:
        read_back(file, 1, clean)
    file.write(aligned(8, seed=1), 0).wait()
    assert torch.equal(read_back(file, 8), aligned(8, seed=1))


def test_a_torn_write_is_found_at_its_first_old_block(engine: IoEngine, tmp_path: Path) -> None:
    file = open_verified(engine, tmp_path / "f")
    file.write(aligned(8, seed=1), 0).wait()
    old = (tmp_path / "f").read_bytes()
    file.write(aligned(8, seed=2), 0).wait()
    with open(tmp_path / "f", "r+b") as torn:
        os.pwrite(torn.fileno(), old[3 * BLOCK :], 3 * BLOCK)
    with pytest.raises(CorruptRecordError, match=f"at offset {3 * BLOCK} "):
        read_back(file, 8)


def test_the_record_is_named(engine: IoEngine, tmp_path: Path) -> None:
    file = open_verified(engine, tmp_path / "f")
    file.write(aligned(1), 0).wait()
    flip_bit(tmp_path / "f", 9)
    record = "state of chunk 3 (block.weight and 2 more)"
    request = IoRequest(file=file, operation=IoOperation.READ, buffer=aligned(1), offset=0, record=record)
    (ticket,) = engine.submit([request])
    with pytest.raises(CorruptRecordError) as caught:
        ticket.wait()
    assert str(caught.value) == (
        f"{tmp_path}/f, {record}: the CRC-32C of the block of 4096 bytes at offset 0 is not that of what was written "
        "there, which is lost: load a checkpoint into a new engine, and examine the drive (smartctl -x), the kernel "
        "log (dmesg) and main memory before that directory is used again"
    )


def test_blocks_written_in_part_never_or_elsewhere_are_not_compared(engine: IoEngine, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(20 * BLOCK))
    file = open_verified(engine, tmp_path / "f", num_blocks=8)
    file.write(aligned(3), 0).wait()
    file.write(torch.ones(10, dtype=torch.uint8), BLOCK + 5).wait()  # part of block 1
    file.write(aligned(12), 6 * BLOCK).wait()  # up to the end and beyond
    for position in (BLOCK, 4 * BLOCK, 12 * BLOCK):
        flip_bit(tmp_path / "f", position)
    read_back(file, 18)
    part = torch.zeros(100, dtype=torch.uint8)
    flip_bit(tmp_path / "f", 0)
    file.read(part, 0).wait()
    with pytest.raises(CorruptRecordError):
        read_back(file, 1)


def test_unaligned_reads_compare_the_whole_blocks_inside(engine: IoEngine, tmp_path: Path) -> None:
    file = open_verified(engine, tmp_path / "f")
    file.write(aligned(4), 0).wait()
    flip_bit(tmp_path / "f", 2 * BLOCK)
    target = torch.zeros(4 * BLOCK - 2, dtype=torch.uint8)
    with pytest.raises(CorruptRecordError) as caught:
        file.read(target, 1).wait()
    assert caught.value.nbytes_done == 2 * BLOCK - 1


def test_many_transfers_at_once_are_all_compared(engine: IoEngine, tmp_path: Path) -> None:
    file = open_verified(engine, tmp_path / "f", num_blocks=256)
    sources = [aligned(4, seed) for seed in range(64)]
    for ticket in [file.write(source, 4 * i * BLOCK) for i, source in enumerate(sources)]:
        ticket.wait()
    bad = {7, 20, 63}
    for i in bad:
        flip_bit(tmp_path / "f", (4 * i + 2) * BLOCK)
    targets = [empty_aligned(4 * BLOCK, torch.uint8) for _ in sources]
    tickets = [file.read(target, 4 * i * BLOCK) for i, target in enumerate(targets)]
    for i, ticket in enumerate(tickets):
        if i in bad:
            with pytest.raises(CorruptRecordError):
                ticket.wait()
        else:
            ticket.wait()
            assert torch.equal(targets[i], sources[i])


def test_a_closed_file_is_not_verified(engine: IoEngine, tmp_path: Path) -> None:
    file = open_verified(engine, tmp_path / "f")
    file.close()
    with pytest.raises(OffloadIOError, match="the file is closed"):
        file.verify(BLOCK)


def test_memory_is_four_bytes_a_block(tmp_path: Path) -> None:
    def resident_nbytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with IoEngine(available_backends()[0]) as engine:
        before = resident_nbytes()
        open_verified(engine, tmp_path / "f", num_blocks=8 << 20)
        assert 30 << 20 <= resident_nbytes() - before <= 36 << 20
