"""Arguments and counters of the I/O engine: directions, flags, buffers and statistics."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from gemini._native import lib
from gemini.tiers import IO_ALIGNMENT_NBYTES

__all__ = ["IoBuffer", "IoOpenFlag", "IoOperation", "IoStats", "describe_buffer", "empty_aligned"]


class IoOperation(enum.Enum):
    """Direction of a transfer, seen from memory."""

    READ = "read"
    WRITE = "write"


class IoOpenFlag(enum.IntFlag):
    """Flags for opening a file; values are those of gn_io_open_flag."""

    READ = lib.GN_IO_OPEN_READ
    WRITE = lib.GN_IO_OPEN_WRITE
    CREATE = lib.GN_IO_OPEN_CREATE
    TRUNCATE = lib.GN_IO_OPEN_TRUNCATE
    DIRECT = lib.GN_IO_OPEN_DIRECT
    """Bypass the page cache for requests whose offset, length and address are multiples of 4096."""


def empty_aligned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Make a host tensor that direct I/O accepts.

    Args:
        numel: number of elements; for direct I/O on the whole tensor its bytes must be a multiple of 4096.
        dtype: any dtype.

    Returns:
        Uninitialised CPU tensor [numel] whose address is a multiple of 4096.
    """
    nbytes = numel * dtype.itemsize
    raw = torch.empty(nbytes + IO_ALIGNMENT_NBYTES, dtype=torch.uint8)
    skip = -raw.data_ptr() % IO_ALIGNMENT_NBYTES
    return raw[skip : skip + nbytes].view(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class IoBuffer:
    """Memory that is not a tensor."""

    address: int
    """Address of the first byte."""
    nbytes: int
    """Length in bytes."""
    owner: object
    """Object that keeps the memory valid; referenced until the transfer is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IoStats:
    """Bytes an engine has moved since its creation."""

    nbytes_read: int
    nbytes_written: int

    def __sub__(self, earlier: IoStats) -> IoStats:
        """Return the bytes moved since an earlier reading."""
        return IoStats(
            nbytes_read=self.nbytes_read - earlier.nbytes_read,
            nbytes_written=self.nbytes_written - earlier.nbytes_written,
        )


def describe_buffer(buffer: torch.Tensor | IoBuffer) -> IoBuffer:
    """Return the address range of a transfer's buffer; refuses a tensor whose bytes are not one run of host memory."""
    if isinstance(buffer, IoBuffer):
        return buffer
    if buffer.device.type != "cpu" or buffer.layout is not torch.strided or not buffer.is_contiguous():
        raise ValueError(
            f"I/O needs a contiguous CPU tensor, got shape {tuple(buffer.shape)}, stride "
            f"{buffer.stride() if buffer.layout is torch.strided else buffer.layout} on {buffer.device}; "
            "copy it with .cpu().contiguous() first"
        )
    nbytes = buffer.numel() * buffer.element_size()
    if nbytes > 0 and buffer.data_ptr() == 0:
        raise ValueError(f"I/O needs a tensor with memory, got shape {tuple(buffer.shape)} with an empty storage")
    return IoBuffer(address=buffer.data_ptr(), nbytes=nbytes, owner=buffer)
