"""Thousands of random operations on a swap file, faults among them, against a plain dictionary."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import FAILING_DEVICE, FULL_DEVICE, flip_bit, redirected
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_resources import random_bytes, truncated_file

from gemini.config import NVMeConfig
from gemini.errors import CorruptRecordError, OffloadIOError, OutOfTierMemoryError
from gemini.offload.extents import Extent
from gemini.offload.io import available_backends, empty_aligned
from gemini.offload.store import DiskStore

BLOCK = 4096
CAPACITY_NBYTES = 64 * BLOCK
NAMES = [backend.value for backend in available_backends()]


def buffer_of(content: bytes) -> torch.Tensor:
    return empty_aligned(len(content), torch.uint8).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))


class StoreMachine(RuleBasedStateMachine):
    """What is on disk is known block by block; None is what a fault has left there, which no read may pass off."""

    @initialize(engine=st.sampled_from(NAMES), direct=st.booleans())
    def start(self, engine: str, direct: bool) -> None:
        self.directory = tempfile.TemporaryDirectory()
        config = NVMeConfig(path=self.directory.name, budget="1MiB", engine=engine, direct=direct, verify=True)  # type: ignore[arg-type]
        self.store = DiskStore(config, capacity_nbytes=CAPACITY_NBYTES)
        self.expected: dict[Extent, list[bytes | None]] = {}
        self.rotten: set[int] = set()  # positions in the file
        self.seed = 0

    def draw_part(self, data: st.DataObject) -> tuple[Extent, int, int]:
        """Choose an extent and a run of its blocks: first and count."""
        extent = data.draw(st.sampled_from(sorted(self.expected, key=lambda each: each.offset)))
        num_blocks = extent.nbytes // BLOCK
        first = data.draw(st.integers(0, num_blocks - 1))
        return extent, first, data.draw(st.integers(1, num_blocks - first))

    def position(self, extent: Extent, block: int) -> int:
        return BLOCK + extent.offset + block * BLOCK

    def fresh(self, count: int) -> bytes:
        self.seed += 1
        return random_bytes(count * BLOCK, self.seed).numpy().tobytes()

    @rule(num_blocks=st.integers(1, 12))
    def allocate(self, num_blocks: int) -> None:
        try:
            extent = self.store.allocate(num_blocks * BLOCK, record=f"record of {num_blocks} blocks")
        except OutOfTierMemoryError:
            assert self.expected  # an empty file has room
            return
        content = self.fresh(num_blocks)  # else its blocks would be those of the extent before it
        self.store.write(extent, buffer_of(content)).wait()
        self.expected[extent] = []
        self.note(extent, 0, content, num_blocks)

    def note(self, extent: Extent, first: int, content: bytes | None, count: int) -> None:
        blocks = self.expected[extent]
        blocks += [None] * (extent.nbytes // BLOCK - len(blocks))
        for i in range(count):
            blocks[first + i] = None if content is None else content[i * BLOCK : (i + 1) * BLOCK]
            self.rotten.discard(self.position(extent, first + i))

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        extent, _, _ = self.draw_part(data)
        self.store.free(extent)
        self.rotten -= {self.position(extent, block) for block in range(extent.nbytes // BLOCK)}
        del self.expected[extent]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        extent, first, count = self.draw_part(data)
        content = self.fresh(count)
        self.store.write(extent, buffer_of(content), offset=first * BLOCK).wait()
        self.note(extent, first, content, count)

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), device=st.sampled_from([FULL_DEVICE, FAILING_DEVICE]))
    def write_to_a_failing_disk(self, data: st.DataObject, device: str) -> None:
        extent, first, count = self.draw_part(data)
        content = self.fresh(count)
        with redirected(self.store.path, device), pytest.raises(OffloadIOError, match="cannot write"):
            self.store.write(extent, buffer_of(content), offset=first * BLOCK).wait()
        self.note(extent, first, None, count)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def tear_a_write(self, data: st.DataObject) -> None:
        """A write that reports success, of which the disk keeps only the beginning."""
        extent, first, count = self.draw_part(data)
        kept = data.draw(st.integers(0, count - 1))
        start = self.position(extent, first + kept)
        old = self.file_bytes(start, (count - kept) * BLOCK)
        content = self.fresh(count)
        self.store.write(extent, buffer_of(content), offset=first * BLOCK).wait()
        self.note(extent, first, content, count)
        with open(self.store.path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), old, start)
        self.note(extent, first + kept, None, count - kept)

    def file_bytes(self, start: int, nbytes: int) -> bytes:
        with open(self.store.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), nbytes, start)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def rot(self, data: st.DataObject) -> None:
        """Change a bit, or change it back."""
        extent, first, _ = self.draw_part(data)
        if self.expected[extent][first] is not None:
            position = self.position(extent, first)
            flip_bit(self.store.path, position)
            self.rotten ^= {position}

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        extent, first, count = self.draw_part(data)
        target = empty_aligned(count * BLOCK, torch.uint8).zero_()
        blocks = self.expected[extent][first : first + count]
        positions = [self.position(extent, first + i) for i in range(count)]
        bad = [i for i in range(count) if blocks[i] is None or positions[i] in self.rotten]
        with self.refusing(positions[bad[0]]) if bad else contextlib.nullcontext():
            self.store.read(extent, target, offset=first * BLOCK).wait()
        if not bad:
            assert target.numpy().tobytes() == b"".join(block for block in blocks if block is not None)

    @contextlib.contextmanager
    def refusing(self, position: int) -> Iterator[None]:
        with pytest.raises(CorruptRecordError, match=f"record of .* at offset {position} "):
            yield

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def read_from_a_failing_disk(self, data: st.DataObject) -> None:
        extent, first, count = self.draw_part(data)
        target = empty_aligned(count * BLOCK, torch.uint8)
        with redirected(self.store.path, FAILING_DEVICE), pytest.raises(OffloadIOError, match="cannot read"):
            self.store.read(extent, target, offset=first * BLOCK).wait()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def read_a_truncated_file(self, data: st.DataObject) -> None:
        extent, first, count = self.draw_part(data)
        target = empty_aligned(count * BLOCK, torch.uint8)
        with truncated_file(Path(self.store.path)), pytest.raises(OffloadIOError, match="the file ends before"):
            self.store.read(extent, target, offset=first * BLOCK).wait()

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "store"):
            assert self.store.held_nbytes == sum(extent.nbytes for extent in self.expected)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            assert os.listdir(self.directory.name) == []
            self.directory.cleanup()


TestStoreAgainstADictionary = StoreMachine.TestCase
TestStoreAgainstADictionary.settings = settings(
    max_examples=60, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)
TestStoreAgainstADictionary.pytestmark = [pytest.mark.slow]
