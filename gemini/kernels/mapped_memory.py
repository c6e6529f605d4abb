"""Memory of a file that other processes also map, and stores that they see in order."""

from __future__ import annotations

import os

import torch

from gemini._native import ffi, lib

__all__ = ["map_file", "publish"]


def map_file(descriptor: int, nbytes: int) -> torch.Tensor:
    """Map a file, shared with all who map it; a memory file gets huge pages if the kernel supports that. Blocking.

    Args:
        descriptor: descriptor of the file, open for reading and writing; may be closed afterwards.
        nbytes: length of the mapping, from the file's beginning; a multiple of 4096.

    Returns:
        uint8 [nbytes]; the mapping ends with the last tensor that refers to it.

    Raises:
        OSError: the system refuses.
    """
    address = ffi.new("void **")
    status = lib.gn_memory_map(descriptor, nbytes, address)
    if status != 0:
        raise OSError(-status, os.strerror(-status))
    memory = ffi.gc(address[0], lambda begin: lib.gn_memory_unmap(begin, nbytes))
    return torch.frombuffer(ffi.buffer(memory, nbytes), dtype=torch.uint8)


def publish(memory: torch.Tensor, offset: int, value: int) -> None:
    """Store a word after all earlier stores and before all later stores.

    Args:
        memory: uint8 tensor from `map_file`.
        offset: offset of the word in bytes; a multiple of 8.
        value: 0 to 2**64 - 1.
    """
    lib.gn_memory_publish(ffi.cast("uint64_t *", memory.data_ptr() + offset), value)
