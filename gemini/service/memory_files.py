"""Memory files: unnamed bytes that several processes can map and that the kernel can seal. Knows no protocol."""

from __future__ import annotations

import fcntl
import os

__all__ = ["create_memory_file", "is_sealed_length", "is_sealed_whole", "nbytes_of", "open_read_only", "seal_whole"]

NAME = "gemini-service"
"""Name that the system shows beside mappings; it is no path to the file."""
_LENGTH_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_ALL_SEALS = _LENGTH_SEALS | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def create_memory_file(nbytes: int) -> int:
    """Make a memory file of fixed length, so that no mapping of it can cause SIGBUS.

    Args:
        nbytes: length in bytes; memory is taken when it is written.

    Returns:
        A descriptor for reading and writing; the caller closes it.

    Raises:
        OSError: the system refuses.
    """
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _LENGTH_SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def seal_whole(descriptor: int) -> None:
    """Forbid all writing permanently; a file that is already sealed is left alone.

    Args:
        descriptor: descriptor of the file, open for writing.

    Raises:
        OSError: EBUSY: a process still has the file mapped for writing.
    """
    if not is_sealed_whole(descriptor):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _ALL_SEALS)


def is_sealed_length(descriptor: int) -> bool:
    """Return whether this is a memory file of fixed length."""
    return _seals_of(descriptor) & _LENGTH_SEALS == _LENGTH_SEALS


def is_sealed_whole(descriptor: int) -> bool:
    """Return whether this is a memory file that can no longer be changed."""
    return _seals_of(descriptor) & _ALL_SEALS == _ALL_SEALS


def nbytes_of(descriptor: int) -> int:
    """Return a memory file's length; first check `is_sealed_length`, because the call may block on other files."""
    return os.fstat(descriptor).st_size


def open_read_only(descriptor: int) -> int:
    """Open the same file again, for reading.

    Args:
        descriptor: descriptor of a memory file.

    Returns:
        A new descriptor. Its mappings cannot be made writable, and kernels before 6.7 allow shared mappings of
        a sealed file only through such a descriptor.

    Raises:
        OSError: the system refuses.
    """
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def _seals_of(descriptor: int) -> int:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # not a memory file
        return 0
