"""The errors a user of this package can meet.

Every message names the object, what was expected, what was found and what to do about it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "CollectiveError",
    "ConfigError",
    "CorruptRecordError",
    "GeminiError",
    "HeapUnavailableError",
    "IllegalTransitionError",
    "MissingCheckpointError",
    "MissingLibraryError",
    "MissingRateError",
    "ModelError",
    "OffloadIOError",
    "OutOfTierMemoryError",
    "RecordingError",
    "ServiceError",
    "SkippedStepsError",
    "TensorError",
    "WorkerError",
    "naming_file",
]


class GeminiError(Exception):
    """Root of all errors raised by this package."""


class ConfigError(GeminiError, ValueError):
    """A configuration value is unknown, malformed or contradicts another one."""


class MissingRateError(ConfigError):
    """A hardware profile lacks a rate that a prediction needs."""


class ModelError(GeminiError, RuntimeError):
    """The wrapped model, or one of its parameters, is not in the state the engine needs."""


class OutOfTierMemoryError(GeminiError, MemoryError, RuntimeError):
    """A memory tier is too small. Also a RuntimeError, like torch's own out-of-memory error."""


class IllegalTransitionError(GeminiError, RuntimeError):
    """A chunk was asked to do something its state does not allow."""


class WorkerError(GeminiError, RuntimeError):
    """A background thread, or a job of the worker pool, failed, was cancelled, or could not be started."""


class CollectiveError(GeminiError, RuntimeError):
    """An operation of all ranks failed: a rank has died, stalled or gone another way."""


class HeapUnavailableError(GeminiError, RuntimeError):
    """The CPU allocator of `gemini.heap` cannot be compiled, loaded or put in place here."""


class MissingLibraryError(GeminiError, ImportError):
    """A library that `gemini.integrations` works with is not installed, or cannot be imported."""


class SkippedStepsError(GeminiError, FloatingPointError):
    """Too many optimizer steps in a row were skipped because their gradients were infinite or NaN."""


class CheckpointError(GeminiError, RuntimeError):
    """A checkpoint is missing, incomplete, damaged or of a later version."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was expected."""


class CheckpointMismatchError(GeminiError, ValueError, RuntimeError):
    """Saved state does not fit the model or optimizer it is loaded into.

    Also a RuntimeError and a ValueError, which torch raises for models and for optimizers.
    """


class TensorError(GeminiError, ValueError, RuntimeError):
    """DiskOffloader cannot write a tensor, or read it back; a RuntimeError too, as TensorNVMe's errors are."""


class RecordingError(GeminiError, ValueError):
    """A recording is missing, of a later version or no recording at all, or what would draw it is not installed."""


class ServiceError(GeminiError, RuntimeError):
    """The node's memory service is not there, or does not do what it was asked."""


class OffloadIOError(GeminiError, OSError, RuntimeError):
    """A read or write of offloaded bytes failed; says where and why. Also a RuntimeError, as in TensorNVMe.

    Args:
        operation: what was attempted, a verb such as "read", "write" or "open".
        path: file concerned.
        errno_value: positive errno of the failure.
        offset: first byte of the transfer in the file, if there was one.
        nbytes: bytes asked for.
        nbytes_done: bytes moved before the failure.
        record: what the bytes are, such as "state of chunk 3 (block.weight and 2 more)"; empty if unknown.
        hint: advice for the user, a clause without a full stop.
    """

    def __init__(
        self,
        operation: str,
        path: str,
        errno_value: int,
        *,
        offset: int | None = None,
        nbytes: int | None = None,
        nbytes_done: int = 0,
        record: str = "",
        hint: str = "",
    ) -> None:
        self.operation = operation
        self.path = path
        self.offset = offset
        self.nbytes = nbytes
        self.nbytes_done = nbytes_done
        self.record = record
        self.hint = hint
        super().__init__(errno_value, self._describe(path, errno_value), path)

    def _describe(self, path: str, errno_value: int) -> str:
        message = f"cannot {self.operation} {path}"
        if self.record:
            message += f", {self.record}"
        if self.nbytes is not None and self.offset is not None:
            message += f": {self.nbytes} bytes at offset {self.offset}, {self.nbytes_done} done"
        message += f": {os.strerror(errno_value)} (errno {errno_value})"
        return f"{message}; {self.hint}" if self.hint else message

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError would call the class with its own arguments.
        fields = {name: getattr(self, name) for name in ("offset", "nbytes", "nbytes_done", "record", "hint")}
        return partial(type(self), **fields), (self.operation, self.path, self.errno)

    def __str__(self) -> str:
        return str(self.strerror)


class CorruptRecordError(OffloadIOError):
    """Bytes came back from disk that were never written there: their CRC-32C differs (`NVMeConfig.verify`).

    `offset` and `nbytes` are those of the read, `nbytes_done` counts its bytes before the first bad block.
    """

    def _describe(self, path: str, errno_value: int) -> str:
        assert self.offset is not None
        block = self.offset + self.nbytes_done
        what = f", {self.record}" if self.record else ""
        return (
            f"{path}{what}: the CRC-32C of the block of 4096 bytes at offset {block} is not that of what was written "
            "there, which is lost: load a checkpoint into a new engine, and examine the drive (smartctl -x), the "
            "kernel log (dmesg) and main memory before that directory is used again"
        )


@contextmanager
def naming_file(operation: str, path: Path) -> Iterator[None]:
    """Turn an OSError in the context into an OffloadIOError that names the operation and the file.

    Args:
        operation: a verb, as for OffloadIOError.
        path: the file.

    Yields:
        Nothing.

    Raises:
        OffloadIOError: an OSError was raised.
    """
    try:
        yield
    except GeminiError:  # some are OSErrors
        raise
    except OSError as error:
        raise OffloadIOError(operation, str(path), error.errno or errno.EIO) from error
