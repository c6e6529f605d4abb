"""Measuring a disk: what is asked of it, what is counted, and that nothing is left."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from gemini.errors import ConfigError, OffloadIOError
from gemini.offload.bandwidth import IoPattern, fill_file, measure_disk, run_pattern, transfers_of
from gemini.offload.io import IoBackend, IoEngine, IoOpenFlag, IoOperation, empty_aligned

READ, WRITE = IoOperation.READ, IoOperation.WRITE
BLOCK_NBYTES = 64 << 10
FLAGS = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.CREATE


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (IoPattern.READ, [(READ, 0), (READ, 1), (READ, 2), (READ, 0)]),
        (IoPattern.WRITE, [(WRITE, 0), (WRITE, 1), (WRITE, 2), (WRITE, 0)]),
        (IoPattern.MIXED, [(READ, 0), (WRITE, 1), (READ, 1), (WRITE, 2), (READ, 2), (WRITE, 0), (READ, 0)]),
    ],
)
def test_a_pattern_goes_round_the_file(pattern: IoPattern, expected: list[tuple[IoOperation, int]]) -> None:
    assert list(islice(transfers_of(pattern, 3), len(expected))) == expected


@pytest.mark.parametrize(
    ("pattern", "reads", "writes"),
    [(IoPattern.READ, 1.0, 0.0), (IoPattern.WRITE, 0.0, 1.0), (IoPattern.MIXED, 0.5, 0.5)],
)
def test_a_run_moves_what_it_counts(pattern: IoPattern, reads: float, writes: float, tmp_path: Path) -> None:
    buffers = [empty_aligned(BLOCK_NBYTES, torch.uint8).fill_(value) for value in range(1, 5)]
    with IoEngine(IoBackend.THREADS, queue_depth=2) as engine:
        file = engine.open(tmp_path / "file", FLAGS)
        fill_file(file, buffers, 8)
        before = engine.stats()
        assert run_pattern(file, pattern, buffers, 8, seconds=0.02) > 0
        moved = engine.stats() - before
    nbytes = moved.nbytes_read + moved.nbytes_written
    assert nbytes >= 4 * BLOCK_NBYTES
    assert abs(moved.nbytes_read - reads * nbytes) <= BLOCK_NBYTES / 2
    assert abs(moved.nbytes_written - writes * nbytes) <= BLOCK_NBYTES / 2


def test_every_block_of_the_file_is_written(tmp_path: Path) -> None:
    buffers = [empty_aligned(BLOCK_NBYTES, torch.uint8).fill_(value) for value in (1, 2)]
    with IoEngine(IoBackend.THREADS) as engine:
        fill_file(engine.open(tmp_path / "file", FLAGS), buffers, 5)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([v]) * BLOCK_NBYTES for v in (1, 2, 1, 2, 1))


def test_measuring_gives_three_figures_and_leaves_nothing(tmp_path: Path) -> None:
    found = measure_disk(tmp_path, nbytes=17 << 20, seconds=0.05)
    assert min(found.read_bytes_per_s, found.write_bytes_per_s, found.mixed_bytes_per_s) > 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_load_runs_beside_the_disk_and_is_counted(tmp_path: Path) -> None:
    begins: list[float] = []

    def load() -> None:
        begins.append(time.perf_counter())
        time.sleep(0.002)

    begin_s = time.perf_counter()
    found = measure_disk(tmp_path, nbytes=17 << 20, seconds=0.05, load=load)
    elapsed_s = time.perf_counter() - begin_s
    assert found.loaded_mixed_bytes_per_s is not None
    assert found.load_calls_per_s is not None
    assert found.loaded_mixed_bytes_per_s > 1e6
    assert begins[-1] - begins[0] <= len(begins) / found.load_calls_per_s <= elapsed_s


def test_what_fails_in_the_load_is_raised(tmp_path: Path) -> None:
    def load() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure_disk(tmp_path, nbytes=17 << 20, seconds=0.05, load=load)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 8388608 bytes and more than 0 s, got 4096 and 1.0"):
        measure_disk(tmp_path, nbytes=4096, seconds=1.0)
    with pytest.raises(ValueError, match="got 8388608 and 0"):
        measure_disk(tmp_path, nbytes=8 << 20, seconds=0)
    with pytest.raises(ConfigError, match="I/O engine: expected"):
        measure_disk(tmp_path, nbytes=8 << 20, seconds=0.01, engine="spdk")
    with pytest.raises(OffloadIOError, match="cannot measure the disk of .*absent: No such file or directory"):
        measure_disk(tmp_path / "absent", nbytes=8 << 20, seconds=0.01)
    assert list(tmp_path.iterdir()) == []
