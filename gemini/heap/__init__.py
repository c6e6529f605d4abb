"""torch's CPU memory, served by an allocator that keeps the process small.

Activations, temporaries and gradients of many sizes leave holes in malloc's heap that nothing else fits in, and malloc
keeps what is freed. `install` gives torch the allocator of torch_allocator.cpp instead, for the whole process. It knows
nothing of chunks: those live in mappings of their own.
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
    """What the allocator holds: blocks of at least 256 KiB. Smaller ones are malloc's and are not counted."""

    live_nbytes: int
    """In blocks that tensors hold."""
    peak_live_nbytes: int
    """The most of it at any time."""
    resident_nbytes: int
    """In pages that were touched and not given back: live blocks, holes between them and what waits for reuse."""
    peak_resident_nbytes: int
    """The most of it at any time."""
    released_nbytes: int
    """Given back to the system, all in all."""
    num_live_blocks: int
    num_free_spans: int


class _RawStatistics(ctypes.Structure):
    """`gn_heap_statistics` of torch_allocator.cpp: the same fields in the same order."""

    _fields_ = tuple((field.name, ctypes.c_uint64) for field in dataclasses.fields(HeapStatistics))


def serve_cpu_memory(choice: Literal["auto", "pool", "system"], *, is_compute_on_cpu: bool) -> None:
    """Install the allocator if the configuration asks for it.

    Args:
        choice: `GeminiConfig.cpu_allocator`.
        is_compute_on_cpu: whether activations live in main memory.

    Raises:
        ConfigError: "pool" was asked for and cannot be had.
    """
    if choice == "system" or (choice == "auto" and not is_compute_on_cpu):
        return
    try:
        install()
    except HeapUnavailableError as error:
        if choice == "pool":
            raise ConfigError(
                f'GeminiConfig.cpu_allocator: "pool" cannot be had, use "auto" or "system": {error}'
            ) from error
        logger.info("torch keeps its own CPU allocator, whose heap takes more memory: %s", error)


def install() -> None:
    """Serve torch's CPU memory from the allocator from now on, in this process. Idempotent.

    What is alive stays valid and is freed by whoever allocated it. The first call after torch or this package was
    installed compiles the allocator, which takes some seconds. Not to be called while other threads create tensors.

    Raises:
        HeapUnavailableError: it cannot be compiled or loaded here, or somebody else's allocator is in place; nothing
            has changed.
    """
    status = _library().gn_heap_install()
    if status == -errno.EBUSY:
        raise HeapUnavailableError("another library has given torch a CPU allocator of its own")
    if status != 0:
        raise HeapUnavailableError(f"no address space can be reserved: {os.strerror(-status)}; see ulimit -v")


def uninstall() -> None:
    """Give torch its own allocator back; live blocks stay valid. Idempotent."""
    if _is_loaded():
        _library().gn_heap_uninstall()


def release() -> None:
    """Give every page that no block uses back to the system."""
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
    """Return the library, or why there is none; a failure is remembered, so that nobody waits for it twice."""
    try:
        return ctypes.CDLL(str(build_allocator(cache_dir())))
    except (HeapUnavailableError, OSError) as error:
        return str(error)
