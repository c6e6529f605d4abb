"""Sustained rates of a disk under the engine's access pattern: reads, writes and both at once, in bytes per second.

Knows files and patterns of transfers. Must not know what the figures are used for.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import itertools
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gemini.errors import OffloadIOError
from gemini.offload.arena import HostArena
from gemini.offload.io import (
    IoBackend,
    IoEngine,
    IoFile,
    IoOpenFlag,
    IoOperation,
    IoTicket,
    choose_backend,
)
from gemini.tiers import TierLedger

__all__ = ["DiskBandwidth", "IoPattern", "fill_file", "measure_disk", "run_pattern", "transfers_of"]

_log = logging.getLogger(__name__)

BLOCK_NBYTES = 4 << 20
QUEUE_DEPTH = 16
NUM_BUFFERS = 2 * QUEUE_DEPTH
"""Number of buffers: more than the kernel takes at a time, so that it never waits for the caller."""


class IoPattern(enum.Enum):
    """A pattern of disk accesses, in order of address."""

    READ = "read"
    WRITE = "write"
    MIXED = "mixed"
    """Alternating reads and writes, half a file apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskBandwidth:
    """Sustained bandwidth of one disk."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    mixed_bytes_per_s: float
    """Bytes read and written per second, added up."""
    is_direct: bool
    """Whether the page cache was bypassed; if not, the figures are not the disk's."""
    loaded_mixed_bytes_per_s: float | None = None
    """`mixed_bytes_per_s` while a load ran beside it; None if there was no load."""
    load_calls_per_s: float | None = None
    """Calls of the load per second; None if there was no load."""


def measure_disk(
    path: str | os.PathLike[str],
    nbytes: int = 1 << 30,
    seconds: float = 2.0,
    *,
    engine: str = "auto",
    load: Callable[[], object] | None = None,
) -> DiskBandwidth:
    """Measure the disk of a directory with a temporary file, which is removed; blocks until done.

    The file is written first, because reading reserved but unwritten blocks does not use the disk.

    Args:
        path: directory on the disk.
        nbytes: length of the file, at least 8 MiB; rounded down to whole blocks of 4 MiB.
        seconds: minimum run time of each of the three patterns.
        engine: as in NVMeConfig.engine.
        load: called repeatedly in a thread during a fourth, mixed run, to measure how the two slow each other down;
            None: no such run.

    Returns:
        The bandwidths.

    Raises:
        ConfigError: the engine does not work on this machine.
        OffloadIOError: the file cannot be made, or the disk is full or fails.
        ValueError: the file is too short, or the time is not positive.
    """
    if nbytes < 2 * BLOCK_NBYTES or seconds <= 0:
        raise ValueError(f"expected at least {2 * BLOCK_NBYTES} bytes and more than 0 s, got {nbytes} and {seconds}")
    try:
        with tempfile.TemporaryDirectory(prefix="gemini-bandwidth-", dir=path) as directory:
            found = _measure(Path(directory) / "file", nbytes // BLOCK_NBYTES, seconds, choose_backend(engine), load)
    except OffloadIOError:
        raise
    except OSError as error:  # the directory's error
        raise OffloadIOError("measure the disk of", os.fsdecode(path), error.errno or errno.EIO) from error
    if not found.is_direct:
        _log.warning("%s does not take O_DIRECT: its bandwidth was measured through the page cache", path)
    return found


def _measure(
    path: Path, num_blocks: int, seconds: float, backend: IoBackend, load: Callable[[], object] | None
) -> DiskBandwidth:
    arena = HostArena(TierLedger({}))
    buffers = [arena.allocate(BLOCK_NBYTES, "bandwidth").random_(0, 256) for _ in range(NUM_BUFFERS)]
    flags = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.CREATE | IoOpenFlag.DIRECT
    with IoEngine(backend, queue_depth=QUEUE_DEPTH, num_threads=QUEUE_DEPTH) as engine:
        file = engine.open(path, flags)
        path.unlink()  # so that the file ends with the process in any case
        fill_file(file, buffers, num_blocks)
        read, write, mixed = (run_pattern(file, pattern, buffers, num_blocks, seconds=seconds) for pattern in IoPattern)
        found = DiskBandwidth(
            read_bytes_per_s=read, write_bytes_per_s=write, mixed_bytes_per_s=mixed, is_direct=file.is_direct
        )
        if load is None:
            return found
        with _CallingInThread(load) as caller:
            loaded = run_pattern(file, IoPattern.MIXED, buffers, num_blocks, seconds=seconds)
        return dataclasses.replace(found, loaded_mixed_bytes_per_s=loaded, load_calls_per_s=caller.calls_per_s)


class _CallingInThread:
    """Calls a function repeatedly in a thread while the context lasts.

    Args:
        call: the function.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self.calls_per_s = 0.0
        """Calls per second; known after the context ends."""
        self._call = call
        self._is_over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="gemini-load")

    def _run(self) -> None:
        num_calls, begin = 0, time.perf_counter()
        try:
            while not self._is_over.is_set():
                self._call()
                num_calls += 1
        except BaseException as error:
            self._error = error
        self.calls_per_s = num_calls / (time.perf_counter() - begin)

    def __enter__(self) -> _CallingInThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error


def fill_file(file: IoFile, buffers: Sequence[torch.Tensor], num_blocks: int) -> None:
    """Write every block of a file and wait until the device has stored it.

    Args:
        file: open for writing.
        buffers: contents, one block each, used in rotation.
        num_blocks: number of blocks in the file.

    Raises:
        OffloadIOError: a write failed.
    """
    _run(file, ((IoOperation.WRITE, block) for block in range(num_blocks)), buffers, deadline=None)
    file.sync()


def run_pattern(
    file: IoFile, pattern: IoPattern, buffers: Sequence[torch.Tensor], num_blocks: int, *, seconds: float
) -> float:
    """Read or write a file's blocks repeatedly.

    Args:
        file: open for the pattern's operations; every block was written before.
        pattern: the pattern.
        buffers: uint8 [one block] each, page aligned; all of them are in flight at once.
        num_blocks: number of blocks in the file, at least two.
        seconds: minimum run time; transfers in flight at its end are awaited and counted.

    Returns:
        Bytes per second, both directions added up.

    Raises:
        OffloadIOError: a transfer failed.
    """
    begin = time.perf_counter()
    nbytes = _run(file, transfers_of(pattern, num_blocks), buffers, deadline=begin + seconds)
    return nbytes / (time.perf_counter() - begin)


def transfers_of(pattern: IoPattern, num_blocks: int) -> Iterator[tuple[IoOperation, int]]:
    """Yield the transfers of a pattern, without end.

    Args:
        pattern: the pattern.
        num_blocks: number of blocks in the file, at least two.

    Yields:
        Direction and block number.
    """
    for index in itertools.count():
        if pattern is IoPattern.MIXED:
            yield IoOperation.READ, index % num_blocks
            yield IoOperation.WRITE, (index + num_blocks // 2) % num_blocks
        else:
            yield IoOperation(pattern.value), index % num_blocks


def _run(
    file: IoFile,
    transfers: Iterable[tuple[IoOperation, int]],
    buffers: Sequence[torch.Tensor],
    *,
    deadline: float | None,
) -> int:
    """Run transfers, with the buffers in rotation, until they or the time end; return the bytes moved."""
    under_way: deque[IoTicket] = deque()
    nbytes = 0
    for (operation, block), buffer in zip(transfers, itertools.cycle(buffers), strict=False):
        if len(under_way) == len(buffers):
            under_way.popleft().wait()
            if deadline is not None and time.perf_counter() >= deadline:
                break
        start = file.read if operation is IoOperation.READ else file.write
        under_way.append(start(buffer, block * buffer.nbytes))
        nbytes += buffer.nbytes
    for ticket in under_way:
        ticket.wait()
    return nbytes
