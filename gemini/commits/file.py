"""A memory file that another process holds, in which the state of a process outlives it.

Knows parts, words and records of bytes, and in which order they are stored; must not know what they mean.

[Note: commit file]
Numbers are little endian; parts begin at multiples of 4096, buffers at a multiple of 2 MiB:

    header       one page, below
    records      two places; the next record goes to the one that does not hold the newest
    blocks       uint32 each: the sequence of the last update that a block of elements has had
    words        uint64 each: where a tile is that has no place of its own in the file
    scratches    one for each worker thread; see gn_adam_journal
    buffers      in the order in which they are taken, which is the same in every process that opens the file

    offset  type      field of the header
    0       8 bytes   magic, b"GEMCOMM" and a zero byte
    8       uint64    length of the file
    16      uint64    identity, by which a kept swap file is known to belong to it
    24      uint64    bytes of a record's place
    32      64 bytes  fingerprint of what lies in it, hexadecimal; zeros: nothing yet
    96      192 bytes  the same in words, UTF-8, cut, padded with zeros

    offset  type      field of a record's place
    0       uint64    sequence, from 1; 0: no record. Stored last, and set to 0 before anything else changes
    8       uint64    bytes of the record; 0: what was published before was dropped
    16      uint32    CRC-32 of the record
    64      bytes     the record
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import weakref
import zlib
from dataclasses import dataclass
from types import TracebackType

import torch

from gemini.errors import CheckpointError, CheckpointMismatchError, ConfigError, ModelError, OutOfTierMemoryError
from gemini.kernels.journal import SCRATCH_NBYTES
from gemini.kernels.mapped_memory import map_file, publish
from gemini.tiers import IO_ALIGNMENT_NBYTES, format_nbytes, round_up

__all__ = ["CommitFile", "CommitLayout", "CommitRecord"]

_MAGIC = b"GEMCOMM\0"
_HEADER = struct.Struct("<8sQQQ64s192s")
_TEXT_NBYTES = 192
_RECORD = struct.Struct("<QQI")
_RECORD_OFFSET = 64
_BUFFER_ALIGNMENT_NBYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitLayout:
    """Positions of the parts of a commit file; see [Note: commit file]."""

    record_nbytes: int
    """Bytes reserved for a record."""
    num_blocks: int
    num_words: int
    num_scratches: int
    buffer_nbytes: int
    """Bytes of all buffers, each of whole pages."""

    @property
    def records(self) -> int:
        """Offset of the first record's place."""
        return IO_ALIGNMENT_NBYTES

    @property
    def blocks(self) -> int:
        """Offset of the blocks' entries."""
        return self.records + 2 * self.record_nbytes

    @property
    def words(self) -> int:
        """Offset of the tiles' words."""
        return self.blocks + _paged(4 * self.num_blocks)

    @property
    def scratches(self) -> int:
        """Offset of the scratches."""
        return self.words + _paged(8 * self.num_words)

    @property
    def overhead_nbytes(self) -> int:
        """Bytes that are not buffers."""
        return self.scratches + _paged(SCRATCH_NBYTES * self.num_scratches)

    @property
    def buffers(self) -> int:
        """Offset of the first buffer."""
        return round_up(self.overhead_nbytes, _BUFFER_ALIGNMENT_NBYTES)

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.buffers + self.buffer_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """The record that was published last."""

    sequence: int
    """From 1."""
    content: bytes


class CommitFile:
    """One process's hold of a commit file, from `create` or `open` until `close`, which buffers taken outlive.

    Only one process holds a file at a time; one that is killed gives it up.

    Args:
        descriptor: the file, open for reading and writing; closed with this.
    """

    is_lockable = True

    def __init__(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(
                "the commit file is in use by another process: wait until that process has ended, or give this "
                "one its own file"
            ) from error
        self._descriptor = descriptor
        self._closer = weakref.finalize(self, os.close, descriptor)
        os.register_at_fork(after_in_child=self._closer)  # the lock would last as long as a child that inherits it
        self._memory: torch.Tensor | None = None
        self._layout: CommitLayout | None = None
        self._taken_nbytes = 0
        self._sequence = 0
        self.has_record = False
        """Whether what was published last is a record, and not that there is none."""
        self.is_disputed = False
        """Whether it is not known if what was published last counts, so that nothing may be published after it."""

    @staticmethod
    def create(descriptor: int, nbytes: int) -> CommitFile:
        """Make a memory file a commit file; its earlier content is lost.

        Args:
            descriptor: a memory file, open for reading and writing; it stays open and the caller's.
            nbytes: its length, from `Blueprint.commits`; the memory is claimed now.

        Returns:
            The file.

        Raises:
            OutOfTierMemoryError: the machine refuses the memory.
            ConfigError: another process holds the file.
        """
        file = CommitFile(_reopen(descriptor))
        try:
            if os.fstat(file._descriptor).st_size != nbytes or os.pread(file._descriptor, _HEADER.size, 0).strip(b"\0"):
                os.ftruncate(file._descriptor, 0)  # else it is new, and perhaps sealed against other lengths
            os.posix_fallocate(file._descriptor, 0, nbytes)
        except OSError as error:
            file.close()
            raise OutOfTierMemoryError(
                f"the machine refused {format_nbytes(nbytes)} for a commit file: {error}; lower host_budget"
            ) from error
        identity = int.from_bytes(secrets.token_bytes(8), "little")
        os.pwrite(file._descriptor, _HEADER.pack(_MAGIC, nbytes, identity, 0, b"", b""), 0)
        return file

    @staticmethod
    def open(descriptor: int) -> CommitFile:
        """Open a file that `create` has made, with what it holds.

        Args:
            descriptor: the file, open for reading and writing; it stays open and the caller's.

        Returns:
            The file.

        Raises:
            CheckpointError: it is no commit file, or has another length than it had, or is damaged.
            ConfigError: another process holds the file.
        """
        file = CommitFile(_reopen(descriptor))
        block, found_nbytes = os.pread(file._descriptor, _HEADER.size, 0), os.fstat(file._descriptor).st_size
        if not block.startswith(_MAGIC) or file.nbytes != found_nbytes:
            expected = f"of {file.nbytes} bytes" if block.startswith(_MAGIC) else "with its magic"
            file.close()
            raise CheckpointError(
                f"expected a commit file {expected}, found another file, of {found_nbytes} bytes: "
                "make one with CommitFile.create"
            )
        try:
            file._find_newest()
        except BaseException:
            file.close()
            raise
        return file

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return int(self._header()[1])

    @property
    def identity(self) -> int:
        """Number that identifies the file."""
        return int(self._header()[2])

    def _header(self) -> tuple[bytes, int, int, int, bytes, bytes]:
        magic, nbytes, identity, record_nbytes, fingerprint, text = _HEADER.unpack(
            os.pread(self._descriptor, _HEADER.size, 0)
        )
        return magic, nbytes, identity, record_nbytes, fingerprint.rstrip(b"\0"), text.rstrip(b"\0")

    # ---------------------------------------------------------------- what lies in it

    def claim(self, layout: CommitLayout, *, fingerprint: str, text: str) -> None:
        """Map the file, to be used as a layout says, from the record that `resume` is given.

        Args:
            layout: what lies where.
            fingerprint: of everything that decides what the bytes mean, at most 64 characters.
            text: the same for people to read.

        Raises:
            ConfigError: the file is too short.
            CheckpointMismatchError: what was published is another engine's.
            CheckpointError: what was published is damaged.
            OutOfTierMemoryError: the machine cannot map it.
        """
        _, nbytes, _, record_nbytes, found, found_text = self._header()
        if nbytes < layout.nbytes:
            raise ConfigError(
                f"the commit file has {nbytes} bytes, this engine needs {layout.nbytes}: make a file of "
                "Blueprint.commits.nbytes bytes"
            )
        newest = self._newest()
        is_ours = (found, record_nbytes) == (fingerprint.encode(), layout.record_nbytes)
        if newest is not None and newest.content and not is_ours:
            raise CheckpointMismatchError(
                f"the commit file holds the state of another engine: {found_text.decode(errors='replace')} "
                f"({found.decode(errors='replace')[:12]}), this one is: {text} ({fingerprint[:12]}). Give the "
                "engine the same model, configuration and budgets as before, with all budgets as numbers, or a "
                "new commit file"
            )
        self._taken_nbytes = 0
        self._memory = _map(self._descriptor, layout.nbytes)
        self._layout = layout
        if newest is None or not is_ours:
            self._clear()
            magic, nbytes, identity, *_ = self._header()
            words = text.encode()[:_TEXT_NBYTES]
            header = (magic, nbytes, identity, layout.record_nbytes, fingerprint.encode(), words)
            os.pwrite(self._descriptor, _HEADER.pack(*header), 0)
        else:
            self._find_newest()

    def resume(self, sequence: int) -> CommitRecord | None:
        """Begin with the last record, published or dropped, or with the one before it; see `withdraw`.

        Args:
            sequence: of it; 0: whatever there is does not count.

        Returns:
            The record; None: there is none, and all entries, words and scratches are zero.

        Raises:
            CheckpointError: it is damaged.
        """
        if sequence:
            self.withdraw(sequence)
        if not sequence or not self.has_record:
            self._clear()
            return None
        return self._newest()

    def _clear(self) -> None:
        assert self._memory is not None
        assert self._layout is not None
        self._memory[self._layout.records : self._layout.overhead_nbytes].zero_()
        self._sequence, self.has_record = 0, False

    def take(self, nbytes: int) -> torch.Tensor:
        """Return the next buffer.

        Args:
            nbytes: whole pages, more than 0.

        Returns:
            uint8 [nbytes], page aligned, with a storage of its own and what the file holds there.
        """
        assert self._layout is not None
        begin, self._taken_nbytes = self._taken_nbytes, self._taken_nbytes + nbytes
        assert self._taken_nbytes <= self._layout.buffer_nbytes, "more is taken than the layout says"
        return self._part(self._layout.buffers + begin, nbytes)

    @property
    def blocks(self) -> torch.Tensor:
        """Entries of the blocks, int32 [num_blocks]."""
        assert self._layout is not None
        return self._part(self._layout.blocks, 4 * self._layout.num_blocks).view(torch.int32)

    @property
    def words(self) -> torch.Tensor:
        """The tiles' words, int64 [num_words]; to be written with `put_word`."""
        assert self._layout is not None
        return self._part(self._layout.words, 8 * self._layout.num_words).view(torch.int64)

    @property
    def scratches(self) -> torch.Tensor:
        """uint8 [num_scratches * SCRATCH_NBYTES]."""
        assert self._layout is not None
        return self._part(self._layout.scratches, SCRATCH_NBYTES * self._layout.num_scratches)

    def put_word(self, index: int, value: int) -> None:
        """Store a word at once: after everything that was stored before and before everything stored later."""
        assert self._layout is not None
        assert 0 <= index < self._layout.num_words
        self._publish(self._layout.words + 8 * index, value)

    def _part(self, begin: int, nbytes: int) -> torch.Tensor:
        assert self._memory is not None
        return torch.frombuffer(self._memory.numpy().data, dtype=torch.uint8, offset=begin, count=nbytes)

    def _publish(self, offset: int, value: int) -> None:
        assert self._memory is not None
        publish(self._memory, offset, value)

    # ---------------------------------------------------------------- records

    @property
    def sequence(self) -> int:
        """Sequence number of the last record, published or dropped by any process; 0 if there is none."""
        return self._sequence

    def publish(self, content: bytes) -> int:
        """Publish a record, which takes the place of the one before the last.

        Args:
            content: the record; empty: that there is none.

        Returns:
            Its sequence.

        Raises:
            ConfigError: it is too long; nothing has happened.
            ModelError: see `is_disputed`.
        """
        if self.is_disputed:
            raise ModelError(
                "engine.commit: the last commit was interrupted, and it is unknown whether the other ranks "
                "completed it: start all ranks again"
            )
        assert self._layout is not None
        assert self._memory is not None
        limit = self._layout.record_nbytes - _RECORD_OFFSET
        if len(content) > limit:
            raise ConfigError(
                f"engine.commit: the record takes {len(content)} bytes, the commit file has room for {limit}: "
                "store less in extra"
            )
        sequence = self._sequence + 1
        place = self._place_of(sequence)
        self._publish(place, 0)
        header = _RECORD.pack(0, len(content), zlib.crc32(content)).ljust(_RECORD_OFFSET, b"\0")
        stored = torch.frombuffer(bytearray(header[8:] + content), dtype=torch.uint8)
        self._memory[place + 8 : place + 8 + stored.numel()] = stored
        self._publish(place, sequence)
        self._sequence, self.has_record = sequence, bool(content)
        return sequence

    def withdraw(self, sequence: int) -> None:
        """Undo the last record, of which nothing may have begun; the one before it is valid again.

        Args:
            sequence: of what counts then: the last one's, for which nothing changes, or one less.

        Raises:
            CheckpointError: it is damaged.
        """
        assert 0 <= self._sequence - sequence <= 1
        if sequence < self._sequence:
            self._publish(self._place_of(self._sequence), 0)
            self._sequence = sequence
            self._find_newest()

    def drop(self) -> None:
        """Publish that there is no record: what lies in the buffers is about to change otherwise than by updates."""
        self.publish(b"")

    def _place_of(self, sequence: int) -> int:
        assert self._layout is not None
        return self._layout.records + sequence % 2 * self._layout.record_nbytes

    def _find_newest(self) -> None:
        newest = self._newest()
        self._sequence = 0 if newest is None else newest.sequence
        self.has_record = newest is not None and bool(newest.content)

    def _newest(self) -> CommitRecord | None:
        """Return what was published last, with no content if it was a drop; None: nothing was."""
        record_nbytes = self._header()[3]
        if record_nbytes == 0:
            return None
        places = [IO_ALIGNMENT_NBYTES, IO_ALIGNMENT_NBYTES + record_nbytes]
        fields = [_RECORD.unpack(os.pread(self._descriptor, _RECORD.size, place)) for place in places]
        number = 0 if fields[0][0] > fields[1][0] else 1
        sequence, nbytes, checksum = fields[number]
        if sequence == 0:
            return None
        content = os.pread(self._descriptor, min(nbytes, record_nbytes), places[number] + _RECORD_OFFSET)
        if zlib.crc32(content) != checksum:
            raise CheckpointError(
                f"the commit file is damaged: the checksum of record {sequence} is wrong; resume from a "
                "checkpoint with a new commit file"
            )
        return CommitRecord(sequence=sequence, content=content)

    def close(self) -> None:
        """Close the file; memory taken from it stays valid while it is referenced. Idempotent."""
        self._memory = None
        self._closer()

    def __enter__(self) -> CommitFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _reopen(descriptor: int) -> int:
    """Return another description of the same file, whose lock is this process's own."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)


def _map(descriptor: int, nbytes: int) -> torch.Tensor:
    mapped = _reopen(descriptor)  # a mapping would hold the lock as well, in every child of a fork
    try:
        return map_file(mapped, nbytes)
    except OSError as error:
        raise OutOfTierMemoryError(
            f"the machine cannot map the {format_nbytes(nbytes)} of a commit file: {error.strerror} "
            f"(errno {error.errno}); lower host_budget"
        ) from error
    finally:
        os.close(mapped)


def _paged(nbytes: int) -> int:
    return round_up(nbytes, IO_ALIGNMENT_NBYTES)
