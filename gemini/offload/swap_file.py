"""The swap file of the disk tier and its ownership.

[Note: swap file]
`gemini-rank{rank}.swap` belongs to the process that holds an exclusive flock(2) on it. So a killed process releases it
automatically, and its file is then taken over. The first 4096 bytes are a header, little endian and padded with
zeros; extents count from its end:

    offset  type      field
    0       8 bytes   magic, b"GEMSWAP" and a zero byte
    8       uint32    format version, 2
    12      uint32    process id of the owner
    16      float64   time of creation, seconds since the epoch
    24      uint64    capacity in bytes, header not counted
    32      64 bytes  host name of the owner, UTF-8, truncated, padded with zeros

The content does not outlive the process: it is scratch space, and its owner removes the file. A file that has the magic
and no owner may therefore be taken, whatever its version; a file without the magic is left alone. The header is on the
device before anything else is done with the file, so that this also holds after a crash of the whole machine.

[Note: kept swap file]
`gemini-rank{rank}.kept` is locked in the same way and holds what a commit file (commits/file.py) refers to. It outlives
its processes; the owner of the commit file removes it. Its header:

    offset  type      field
    0       8 bytes   magic, b"GEMKEPT" and a zero byte
    8       uint64    identity of the commit file
    16      uint64    capacity in bytes, header not counted

When a process ends, the kernel may still carry out its transfers. Reserving the file's space again waits for them
(inode_dio_wait, in ext4's and XFS's fallocate), so this comes before anything else is done with the file or with the
memory that was to be written.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemini.errors import CheckpointMismatchError, OffloadIOError, naming_file
from gemini.tiers import IO_ALIGNMENT_NBYTES, format_nbytes

__all__ = [
    "HEADER_NBYTES",
    "GivenFile",
    "KeptSwap",
    "SwapHeader",
    "check_directory",
    "leave_file",
    "remove_abandoned",
    "remove_file",
    "reserve",
    "take_file",
    "take_kept_file",
]

_log = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sIIdQ64s")
_MAGIC = b"GEMSWAP\0"
_FORMAT_VERSION = 2
_HOST_NBYTES = 64
HEADER_NBYTES = IO_ALIGNMENT_NBYTES
"""First byte of the extents."""


_KEPT_HEADER = struct.Struct("<8sQQ")
_KEPT_MAGIC = b"GEMKEPT\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenFile:
    """A swap file whose maker, outside this process, has reserved its space and removes it."""

    path: Path
    """Path for messages."""
    fd: int
    """Descriptor for reading and writing; its maker closes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSwap:
    """The second half of a state whose first half is in a commit file; see [Note: kept swap file]."""

    identity: int
    """Identity of the commit file."""
    has_content: bool
    """Whether the file must hold what was committed; otherwise its content is not needed."""

    def claim(self, path: Path, fd: int, capacity_nbytes: int) -> bytes:
        """Check that a file locked by `take_kept_file` is the expected one, and reserve its space.

        Args:
            path: path for messages.
            fd: descriptor of the file.
            capacity_nbytes: bytes reserved for extents.

        Returns:
            The header, a block of 4096 bytes.

        Raises:
            CheckpointMismatchError: the file does not hold what was committed.
            OffloadIOError: the device is full.
        """
        header = _KEPT_HEADER.pack(_KEPT_MAGIC, self.identity, capacity_nbytes).ljust(HEADER_NBYTES, b"\0")
        if self.has_content:
            self._check(path, os.pread(fd, HEADER_NBYTES, 0), header)
            with naming_file("reserve space for", path):
                os.posix_fallocate(fd, 0, HEADER_NBYTES + capacity_nbytes)
        else:
            os.ftruncate(fd, 0)
            reserve(path, fd, header, HEADER_NBYTES + capacity_nbytes)
        return header

    def _check(self, path: Path, found: bytes, header: bytes) -> None:
        if found == header:
            return
        what = "nothing of the kind"
        if found.startswith(_KEPT_MAGIC):
            what = "identity {1:#x} and {2} bytes".format(*_KEPT_HEADER.unpack_from(found))
        expected = "identity {1:#x} and {2} bytes".format(*_KEPT_HEADER.unpack_from(header))
        raise CheckpointMismatchError(
            f"{path}: expected the swap file of the committed state, {expected}, found {what}: set "
            "NVMeConfig.path to the directory that it was committed with, or resume from a checkpoint with a new "
            "commit file"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapHeader:
    """First block of a swap file; see [Note: swap file]."""

    pid: int
    created_s: float
    """Seconds since the epoch."""
    capacity_nbytes: int
    host: str
    """Name of the owner's machine, because machines that share a file system may use the same process ids."""

    @property
    def owner(self) -> str:
        """Description of the file's owner."""
        return f"process {self.pid} on {self.host}" if self.host.isprintable() and self.host else f"process {self.pid}"

    def pack(self) -> bytes:
        """Return the header block, 4096 bytes."""
        host = self.host.encode("utf-8", "replace")[:_HOST_NBYTES]
        fields = _HEADER.pack(_MAGIC, _FORMAT_VERSION, self.pid, self.created_s, self.capacity_nbytes, host)
        return fields.ljust(HEADER_NBYTES, b"\0")

    @staticmethod
    def unpack(block: bytes) -> SwapHeader | None:
        """Read a block with any content; None if it is not a header of this version."""
        if len(block) < _HEADER.size or not bears_magic(block):
            return None
        _, version, pid, created_s, capacity_nbytes, host = _HEADER.unpack_from(block)
        if version != _FORMAT_VERSION:
            return None
        return SwapHeader(
            pid=pid,
            created_s=created_s,
            capacity_nbytes=capacity_nbytes,
            host=host.rstrip(b"\0").decode("utf-8", "replace"),
        )


def bears_magic(block: bytes) -> bool:
    """Return whether a file that begins with these bytes is a swap file of any version."""
    return block.startswith(_MAGIC)


def remove_abandoned(directory: Path) -> list[Path]:
    """Remove the swap files of dead processes.

    Args:
        directory: the directory to search.

    Returns:
        The removed files. Files of living processes stay, and so do files that cannot be removed.
    """
    removed = []
    for path in sorted(directory.glob("gemini-rank*.swap")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            _lock(path, fd)
            if _is_same_file(path, fd):
                _empty_stale_file(path, fd)
                os.unlink(path)
                removed.append(path)
        except OSError:
            continue
        finally:
            os.close(fd)
    return removed


def take_file(path: Path) -> int:
    """Open and lock the swap file, which is made if it is missing; a dead owner's file is emptied and taken over.

    Args:
        path: the file's path.

    Returns:
        The descriptor that holds the lock.

    Raises:
        OffloadIOError: another process holds it, something else is at the path, or the directory cannot be used.
    """
    return _open_locked(path, _empty_stale_file)


def take_kept_file(path: Path) -> int:
    """Open and lock a swap file that outlives its processes; it is made if it is missing.

    Args:
        path: the file's path.

    Returns:
        The descriptor that holds the lock.

    Raises:
        OffloadIOError: another process holds it, something else is at the path, or the directory cannot be used.
    """
    return _open_locked(path, _check_kept_file)


def _open_locked(path: Path, prepare: Callable[[Path, int], None]) -> int:
    check_directory(path.parent)
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _directory_error(path, error.errno or errno.EIO) from error
        try:
            _lock(path, fd)
            if _is_same_file(path, fd):
                prepare(path, fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its owner removed it between this process's open and lock


def _check_kept_file(path: Path, fd: int) -> None:
    if os.fstat(fd).st_size and not os.pread(fd, HEADER_NBYTES, 0).startswith(_KEPT_MAGIC):
        hint = "a file of that name exists but is not a kept swap file: move it away"
        raise OffloadIOError("use as swap space", str(path), errno.EEXIST, hint=hint)


def check_directory(directory: Path) -> None:
    """Raise OffloadIOError if the directory does not exist."""
    try:
        is_directory = directory.is_dir()
        directory.stat()
    except OSError as error:
        raise _directory_error(directory, error.errno or errno.EIO) from error
    if not is_directory:
        raise _directory_error(directory, errno.ENOTDIR)


def _directory_error(path: Path, errno_value: int) -> OffloadIOError:
    hints = {
        errno.ENOENT: "create the directory first, or name another one in NVMeConfig.path",
        errno.ENOTDIR: "NVMeConfig.path must name a directory",
        errno.EROFS: "the file system is mounted read-only; name a writable directory in NVMeConfig.path",
        errno.EACCES: "the directory is not writable for this user; name another one in NVMeConfig.path",
        errno.EPERM: "the directory is not writable for this user; name another one in NVMeConfig.path",
        errno.ENOSPC: "free space on that file system, or name another directory in NVMeConfig.path",
        errno.ELOOP: "the name is a symbolic link, which is not followed; remove it",
    }
    hint = hints.get(errno_value, "name another directory in NVMeConfig.path")
    return OffloadIOError("use as swap space", str(path), errno_value, hint=hint)


def _lock(path: Path, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        header = SwapHeader.unpack(os.pread(fd, HEADER_NBYTES, 0))
        owner = "another process" if header is None else header.owner
        hint = f"{owner} uses it now: give this run another directory, or wait until that process has ended"
        raise OffloadIOError("lock", str(path), errno.EBUSY, hint=hint) from error
    except OSError as error:
        raise _directory_error(path, error.errno or errno.EIO) from error


def _is_same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _empty_stale_file(path: Path, fd: int) -> None:
    nbytes = os.fstat(fd).st_size
    if nbytes == 0:
        return
    block = os.pread(fd, HEADER_NBYTES, 0)
    if not bears_magic(block):
        hint = "a file of that name exists but is not a swap file: move it away"
        raise OffloadIOError("use as swap space", str(path), errno.EEXIST, hint=hint)
    header = SwapHeader.unpack(block)
    owner = "a process of another version" if header is None else header.owner
    _log.info("taking over swap file %s (%s): its owner, %s, is gone", path, format_nbytes(nbytes), owner)
    os.ftruncate(fd, 0)


def reserve(path: Path, fd: int, header: bytes, nbytes: int) -> None:
    """Write a locked file's header to the device and reserve its space, or raise OffloadIOError."""
    try:
        os.pwrite(fd, header, 0)  # first, so that a process that finds the lock taken can name this one
        os.fsync(fd)
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        os.ftruncate(fd, 0)
        state = os.fstatvfs(fd)
        num_free = state.f_bavail * state.f_frsize
        hint = (
            f"the swap file needs {format_nbytes(nbytes)} ({nbytes} bytes), the file system has "
            f"{format_nbytes(num_free)} ({num_free} bytes) free: free some, or keep more in a faster tier"
        )
        if error.errno == errno.EFBIG:
            hint = f"the swap file needs {nbytes} bytes, which is above a file size limit (ulimit -f): raise it"
        raise OffloadIOError("reserve space for", str(path), error.errno or errno.EIO, hint=hint) from error


def remove_file(path: Path, fd: int, pid: int) -> None:
    """Remove a swap file and release its lock; a forked child only closes its descriptor."""
    try:
        if os.getpid() == pid and _is_same_file(path, fd):
            os.unlink(path)
    except OSError as error:
        _log.warning("cannot remove swap file %s: %s", path, error)
    finally:
        os.close(fd)


def leave_file(path: Path, fd: int, pid: int) -> None:
    """Release the lock of a swap file that is kept; arguments as for `remove_file`."""
    os.close(fd)
