"""Memory files: bytes without a name that several processes can map, and that the kernel seals. Knows no protocol."""

from __future__ import annotations

import fcntl
import os

__all__ = ["create_memory_file", "is_sealed_length", "is_sealed_whole", "nbytes_of", "open_read_only", "seal_whole"]

NAME = "gemini-service"
"""What the system shows beside mappings; leads nobody to the file."""
_LENGTH_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_ALL_SEALS = _LENGTH_SEALS | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def create_memory_file(nbytes: int) -> int:
    """Make a memory file whose length nobody can change, so that no mapping of it can end in SIGBUS.

    Args:
        nbytes: its length; memory is taken when it is written.

    Returns:
        A descriptor for reading and writing, the caller's to close.

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
    """Refuse writing, for good and to everybody; a file that is sealed already is left alone.

    Args:
        descriptor: of the file, opened for writing.

    Raises:
        OSError: EBUSY: somebody still has it mapped for writing.
    """
    if not is_sealed_whole(descriptor):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _ALL_SEALS)


def is_sealed_length(descriptor: int) -> bool:
    """Return whether this is a memory file of fixed length."""
    return _seals_of(descriptor) & _LENGTH_SEALS == _LENGTH_SEALS


def is_sealed_whole(descriptor: int) -> bool:
    """Return whether this is a memory file that nobody can change any more."""
    return _seals_of(descriptor) & _ALL_SEALS == _ALL_SEALS


def nbytes_of(descriptor: int) -> int:
    """Return a memory file's length; call it on what `is_sealed_length`, as other files may keep one waiting."""
    return os.fstat(descriptor).st_size


def open_read_only(descriptor: int) -> int:
    """Open the same file once more, for reading.

    Args:
        descriptor: of a memory file.

    Returns:
        Another descriptor. Mappings of it cannot be made writable, and kernels before 6.7 allow shared mappings of
        a sealed file through no other.

    Raises:
        OSError: the system refuses.
    """
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def _seals_of(descriptor: int) -> int:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # not a memory file
        return 0
