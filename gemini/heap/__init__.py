"""An allocator for torch's CPU memory that keeps the process small.

Activations, temporaries and gradients of many sizes leave holes in malloc's heap that nothing else fits in, and malloc
keeps what is freed. `install` gives torch the allocator of torch_allocator.cpp instead, for the whole process. It does
not know chunks, which are in separate mappings.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal

from gemini.errors import ConfigError, HeapUnavailableError
from gemini.heap.build import build_allocator, cache_dir

__all__ = ["HeapStatistics", "install", "release", "serve_cpu_memory", "statistics", "uninstall"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeapStatistics:
    """Bytes that the allocator holds in blocks of at least 256 KiB. Smaller blocks are malloc's and are not counted."""

    live_nbytes: int
    """Bytes in blocks that tensors hold."""
    peak_live_nbytes: int
    """Maximum of `live_nbytes` at any time."""
    resident_nbytes: int
    """Bytes in pages that were touched and not returned: live blocks, holes between them, blocks for reuse."""
    peak_resident_nbytes: int
    """Maximum of `resident_nbytes` at any time."""
    released_nbytes: int
    """Total bytes that were returned to the system."""
    num_live_blocks: int
    num_free_spans: int


class _RawStatistics(ctypes.Structure):
    """`gn_heap_statistics` of torch_allocator.cpp: the same fields in the same order."""

    _fields_ = tuple((field.name, ctypes.c_uint64) for field in dataclasses.fields(HeapStatistics))


def serve_cpu_memory(choice: Literal["auto", "pool", "system"], *, is_compute_on_cpu: bool) -> None:
    """Install the allocator if the configuration asks for it.

    Args:
        choice: `GeminiConfig.cpu_allocator`.
        is_compute_on_cpu: whether activations are in main memory.

    Raises:
        ConfigError: "pool" was configured and is not available.
    """
    if choice == "system" or (choice == "auto" and not is_compute_on_cpu):
        return
    try:
        install()
    except HeapUnavailableError as error:
        if choice == "pool":
            raise ConfigError(
                f'GeminiConfig.cpu_allocator: "pool" is not available, use "auto" or "system": {error}'
            ) from error
        logger.info("torch keeps its own CPU allocator, whose heap takes more memory: %s", error)


def install() -> None:
    """Serve torch's CPU memory from this allocator from now on, in this process. Idempotent.

    Live blocks stay valid, and the allocator that made them frees them. The first call after torch or this package was
    installed compiles the allocator, which takes some seconds. Must not be called while other threads create tensors.

    Raises:
        HeapUnavailableError: it cannot be compiled or loaded here, or another library's allocator is installed; nothing
            has changed.
    """
    status = _library().gn_heap_install()
    if status == -errno.EBUSY:
        raise HeapUnavailableError("another library has replaced torch's CPU allocator")
    if status != 0:
        raise HeapUnavailableError(f"no address space can be reserved: {os.strerror(-status)}; see ulimit -v")


def uninstall() -> None:
    """Restore torch's own allocator; live blocks stay valid. Idempotent."""
    if _is_loaded():
        _library().gn_heap_uninstall()


def release() -> None:
    """Return every unused page to the system."""
    if _is_loaded():
        _library().gn_heap_release()


def statistics() -> HeapStatistics | None:
    """Return what the allocator holds now; None if it was never installed in this process."""
    if not _is_loaded():
        return None
    raw = _RawStatistics()
    _library().gn_heap_read_statistics(ctypes.byref(raw))
    return HeapStatistics(**{name: getattr(raw, name) for name, *_ in raw._fields_})


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise HeapUnavailableError(loaded)
    return loaded


def _is_loaded() -> bool:
    return _load.cache_info().currsize > 0 and not isinstance(_load(), str)


@cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none; a failure is remembered, so that no call repeats it."""
    try:
        return ctypes.CDLL(str(build_allocator(cache_dir())))
    except (HeapUnavailableError, OSError) as error:
        return str(error)
