"""An unnamed file in memory that holds buffers once for several processes of a machine.

One process, the writer, fills it; the others read. The kernel frees it with its last user, however that process ends.
The callers arrange how a process learns of another's file.

[Note: One copy that everybody may write to]
Parameters that show the file are ordinary tensors, and a program may write to them. With a read-only mapping, such a
write would end the program with a signal. So where parameters show the file itself, it is mapped copy-on-write: a page
that a process writes to becomes private to it, and all others stay shared. Where the file is only copied to a device,
only the writer can write to it, and it is mapped as shared: page-locking a copy-on-write mapping would give each
process its own copy.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass

import torch

from gemini.tiers import IO_ALIGNMENT_NBYTES, round_up

__all__ = ["MemoryFile", "MemoryFileAddress", "SharedBuffer"]

NAME = "gemini"
"""Name that the system shows beside mappings; it is no path to the file."""
F_SEAL_FUTURE_WRITE = 0x0010
"""Value from Linux's <linux/fcntl.h>, since 5.1; Python's fcntl has no name for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFileAddress:
    """The address at which another process of the machine finds a memory file."""

    pid: int
    descriptor: int
    inode: int
    """Inode, which tells the file from a later one at the same place."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedBuffer:
    """A part of a memory file in one process."""

    view: torch.Tensor
    """Memory that this process reads: uint8 [nbytes], page aligned, with a storage of its own."""
    writer: torch.Tensor | None
    """Memory that the writer writes and all processes read: uint8 [nbytes]; None in other processes."""
    mappings: tuple[mmap.mmap, ...]
    """Mappings that contain both views."""
    offset: int
    """First byte in the file."""

    def refresh(self) -> None:
        """Show the file's present content, and count its pages as resident here only from their next use.

        Private copies of pages that this process has written to are dropped.
        """
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED, self.offset, self.view.numel())


class MemoryFile:
    """One process's hold on a memory file, from `create` or `open` until `close`; parts that were taken remain.

    Args:
        descriptor: descriptor of the file for reading and writing; closed with this.
        is_writer: whether this process fills the file.
    """

    def __init__(self, descriptor: int, *, is_writer: bool) -> None:
        self.is_writer = is_writer
        self.num_users = 1
        """Number of processes among which the file's bytes are divided."""
        self._descriptor = descriptor
        self._nbytes = self._taken_nbytes = 0
        self._is_read_in_place = False
        self._mappings: tuple[mmap.mmap, ...] = ()
        """Mapping that parameters or copies read, followed by the writer's mapping if that is a different one."""

    @staticmethod
    def create() -> MemoryFile:
        """Make an empty file, which this process fills.

        Returns:
            The file.

        Raises:
            OSError: the system refuses.
        """
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return MemoryFile(descriptor, is_writer=True)

    @staticmethod
    def open(address: MemoryFileAddress) -> MemoryFile:
        """Open another process's file, which that process must still hold.

        Args:
            address: the file's address.

        Returns:
            The file.

        Raises:
            OSError: the process is gone, invisible or another user's, or has another file there.
        """
        path = f"/proc/{address.pid}/fd/{address.descriptor}"
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(descriptor).st_ino != address.inode:
            os.close(descriptor)
            raise OSError(errno.ESTALE, "another file is there, as in another container", path)
        return MemoryFile(descriptor, is_writer=False)

    @property
    def address(self) -> MemoryFileAddress:
        """Address at which other processes find the file."""
        inode = os.fstat(self._descriptor).st_ino
        return MemoryFileAddress(pid=os.getpid(), descriptor=self._descriptor, inode=inode)

    def share_of(self, nbytes: int) -> int:
        """Return the bytes, in whole pages, that each user counts for a part of the file."""
        return round_up(-(-nbytes // self.num_users), IO_ALIGNMENT_NBYTES)

    def lay_out(self, nbytes: int, *, is_read_in_place: bool) -> None:
        """Declare the file's layout; all its users declare the same.

        Args:
            nbytes: length of all parts together, in whole pages.
            is_read_in_place: whether parameters will show the file itself; see [Note: One copy that everybody may
                write to].
        """
        self._nbytes, self._is_read_in_place = nbytes, is_read_in_place

    def take(self, nbytes: int) -> SharedBuffer:
        """Return the next part of the file; all its users take the same parts in the same order.

        Args:
            nbytes: length in whole pages, more than 0.

        Returns:
            The part; zero until the writer writes.

        Raises:
            OSError: the machine refuses.
        """
        if not self._mappings:
            self._map()
        offset, self._taken_nbytes = self._taken_nbytes, self._taken_nbytes + nbytes
        parts = [torch.frombuffer(each, dtype=torch.uint8, offset=offset, count=nbytes) for each in self._mappings]
        writer = parts[-1] if self.is_writer else None
        return SharedBuffer(view=parts[0], writer=writer, mappings=self._mappings, offset=offset)

    def _map(self) -> None:
        os.ftruncate(self._descriptor, self._nbytes)
        ways = [mmap.MAP_PRIVATE if self._is_read_in_place else mmap.MAP_SHARED]
        if self.is_writer and self._is_read_in_place:
            ways.append(mmap.MAP_SHARED)
        self._mappings = tuple(mmap.mmap(self._descriptor, self._nbytes, flags=way) for way in ways)
        for mapping in self._mappings:
            with suppress(OSError):  # a kernel without huge pages; most provide none for memory files by default
                mapping.madvise(mmap.MADV_HUGEPAGE)

    def reserve(self, buffer: SharedBuffer) -> None:
        """Claim a part's memory now, where a shortage is an error; at the first write it would be a signal.

        Args:
            buffer: the part; only the writer claims it.

        Raises:
            OSError: there is not enough memory.
        """
        if buffer.writer is not None:
            os.posix_fallocate(self._descriptor, buffer.offset, buffer.writer.numel())

    def seal(self) -> None:
        """Permanently fix the length, and forbid writing except through parts that were taken.

        The writer calls this once all users have taken their parts; calls by other processes do nothing.
        """
        if not self.is_writer:
            return
        length = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, length | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except OSError:  # a kernel before 5.1
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, length)

    def close(self) -> None:
        """Close the file; parts that were taken stay until nothing refers to them. Idempotent."""
        self._mappings = ()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
