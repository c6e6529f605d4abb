"""The kernel interfaces for I/O, and which of them work on this machine."""

from __future__ import annotations

import enum
import errno
import logging
import os

from gemini._native import lib
from gemini.errors import ConfigError

__all__ = ["IoBackend", "available_backends", "best_backend", "choose_backend", "explain_refusal", "native_number"]

_log = logging.getLogger(__name__)


class IoBackend(enum.Enum):
    """Kernel interface for transfers, best first."""

    URING = "io_uring"
    AIO = "aio"
    THREADS = "threads"


_NATIVE_BACKENDS = {
    IoBackend.URING: lib.GN_IO_URING,
    IoBackend.AIO: lib.GN_IO_AIO,
    IoBackend.THREADS: lib.GN_IO_THREADS,
}


def native_number(backend: IoBackend) -> int:
    """Return the gn_io_backend of a backend."""
    return int(_NATIVE_BACKENDS[backend])


def available_backends() -> tuple[IoBackend, ...]:
    """Return the backends that work on this machine now, best first."""
    return tuple(backend for backend in IoBackend if _works(backend))


def best_backend() -> IoBackend:
    """Return the first of `available_backends` without testing the others, because one of those tests takes a while."""
    return next(backend for backend in IoBackend if _works(backend))


def _works(backend: IoBackend) -> bool:
    return bool(lib.gn_io_probe(native_number(backend)) == 0)


def choose_backend(name: str) -> IoBackend:
    """Turn a configuration value into a backend that works here.

    Args:
        name: "auto" for the best one, or "io_uring", "aio" or "threads".

    Returns:
        The backend; for "auto" without io_uring the next best one, after a warning.

    Raises:
        ConfigError: the name is unknown, or that backend does not work on this machine.
    """
    if name == "auto":
        chosen = best_backend()
        if chosen is not IoBackend.URING:
            _log.warning(
                "io_uring does not work here (%s); using %s instead", explain_refusal(IoBackend.URING), chosen.value
            )
        return chosen
    try:
        backend = IoBackend(name)
    except ValueError:
        raise ConfigError(f'I/O engine: expected "auto", "io_uring", "aio" or "threads", got {name!r}') from None
    why = explain_refusal(backend)
    if why:
        raise ConfigError(f'I/O engine {name!r} does not work on this machine: {why}; use "auto"')
    return backend


def explain_refusal(backend: IoBackend) -> str:
    """Return why a backend does not work on this machine; empty if it does."""
    status = lib.gn_io_probe(native_number(backend))
    if status == 0:
        return ""
    why = f"{os.strerror(-status)} (errno {-status})"
    if backend is IoBackend.URING and -status in (errno.EPERM, errno.EACCES):
        why += ", forbidden by a container's seccomp profile or by sysctl kernel.io_uring_disabled"
    if backend is IoBackend.AIO and -status == errno.EAGAIN:
        why += ", sysctl fs.aio-max-nr is used up"
    return why
