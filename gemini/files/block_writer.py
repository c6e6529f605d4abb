"""Writes a file of known length past the page cache, any run of bytes at a time, asynchronously.

Through the page cache, a large file costs one more copy and, on some machines, most of the drive's speed; and it
displaces other programs' pages. Whole blocks are copied to aligned buffers and written from these. The rest at the ends
of a run, at most a page each, goes through the page cache.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from gemini.errors import naming_file
from gemini.offload.io import IoEngine, IoOpenFlag, IoTicket, empty_aligned
from gemini.offload.io_backends import best_backend
from gemini.tiers import IO_ALIGNMENT_NBYTES, round_up

__all__ = ["BLOCK_NBYTES", "BlockWriter", "cut_at_blocks"]

BLOCK_NBYTES = 4 << 20
"""Maximum bytes of one write."""
NUM_BUFFERS = 4
MAX_FRAGMENTS = 64
"""Maximum number of running writes through the page cache."""


def cut_at_blocks(offset: int, nbytes: int) -> Iterator[slice]:
    """Cut a run of bytes so that all parts but the first and the last can bypass the page cache.

    Args:
        offset: offset of the run in its file.
        nbytes: length of the run.

    Yields:
        Parts, in order, counted from the start of the run: at most `BLOCK_NBYTES` long.
    """
    place, end = offset, offset + nbytes
    while place < end:
        if place % IO_ALIGNMENT_NBYTES:
            stop = min(round_up(place, IO_ALIGNMENT_NBYTES), end)
        elif end - place >= IO_ALIGNMENT_NBYTES:
            stop = min(place + BLOCK_NBYTES, end - end % IO_ALIGNMENT_NBYTES)
        else:
            stop = end
        yield slice(place - offset, stop - offset)
        place = stop


class BlockWriter:
    """Writes one new file.

    Args:
        path: path of the file; must not exist.
        nbytes: length of the file; reserved, if the file system supports that.

    Raises:
        OffloadIOError: the file cannot be created, or there is no room.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        with naming_file("create", path):
            created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with naming_file("reserve space for", path):
                _reserve(created, nbytes)
        finally:
            os.close(created)
        self._engine = IoEngine(best_backend())
        try:
            self._file = self._engine.open(path, IoOpenFlag.WRITE | IoOpenFlag.DIRECT)
        except BaseException:
            self._engine.close()
            raise
        self._buffers = [empty_aligned(BLOCK_NBYTES, torch.uint8) for _ in range(NUM_BUFFERS)]
        self._blocks: deque[IoTicket] = deque()
        self._fragments: deque[IoTicket] = deque()

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Start writing a run of bytes; returns when the bytes have been copied.

        Args:
            offset: offset in the file.
            data: uint8, 1D, contiguous, on the CPU.

        Raises:
            OffloadIOError: this write or an earlier one failed.
        """
        for part in cut_at_blocks(offset, data.numel()):
            place, values = offset + part.start, data[part]
            if place % IO_ALIGNMENT_NBYTES or values.numel() % IO_ALIGNMENT_NBYTES:
                if len(self._fragments) == MAX_FRAGMENTS:
                    self._fragments.popleft().wait()
                self._fragments.append(self._file.write(values.clone(), place))
                continue
            if len(self._blocks) == NUM_BUFFERS:
                self._blocks.popleft().wait()
            buffer = self._buffers[0][: values.numel()]
            self._buffers.append(self._buffers.pop(0))
            buffer.copy_(values)
            self._blocks.append(self._file.write(buffer, place))

    def finish(self) -> None:
        """Block until everything is on the drive, and close the file.

        Raises:
            OffloadIOError: a write failed.
        """
        for ticket in (*self._blocks, *self._fragments):
            ticket.wait()
        self._file.sync()
        self._engine.close()

    def abort(self) -> None:
        """Close the file in its present state; idempotent."""
        self._engine.close()


def _reserve(file: int, nbytes: int) -> None:
    """Reserve the file's space so that a full drive is noticed now; without support it is noticed while writing."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
            raise
