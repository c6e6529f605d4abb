"""The error tree: what a user may catch, and what an I/O error says."""

from __future__ import annotations

import errno
import inspect
import pickle
from pathlib import Path

import pytest

from gemini import errors
from gemini.errors import GeminiError, MissingCheckpointError, OffloadIOError, naming_file


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("CheckpointMismatchError", ValueError),  # as of torch's optimizers
        ("CheckpointMismatchError", RuntimeError),  # as of torch's modules
        ("ConfigError", ValueError),
        ("IllegalTransitionError", RuntimeError),
        ("ModelError", RuntimeError),
        ("MissingCheckpointError", FileNotFoundError),  # as of torch.load
        ("MissingCheckpointError", OSError),  # as of from_pretrained
        ("MissingCheckpointError", RuntimeError),  # as all of CheckpointError
        ("OffloadIOError", OSError),
        ("OffloadIOError", RuntimeError),  # as of TensorNVMe
        ("OutOfTierMemoryError", MemoryError),
        ("OutOfTierMemoryError", RuntimeError),  # as of torch
        ("SkippedStepsError", FloatingPointError),
        ("TensorError", ValueError),
        ("TensorError", RuntimeError),  # as of TensorNVMe
        ("WorkerError", RuntimeError),
    ],
)
def test_each_error_is_a_gemini_error_and_python_s_own_kind(name: str, builtin: type[Exception]) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, GeminiError)
    assert issubclass(kind, builtin)


def test_a_file_being_named_does_not_hide_what_is_missing() -> None:
    with pytest.raises(MissingCheckpointError), naming_file("read", Path("/checkpoint")):
        raise MissingCheckpointError("no checkpoint")


def test_every_error_of_the_module_is_public_and_documented() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert sorted(kind.__name__ for kind in kinds) == sorted(name for name in errors.__all__ if name[0].isupper())
    assert all(kind.__doc__ for kind in kinds)


def test_an_io_error_says_where_how_far_why_and_what_to_do() -> None:
    error = OffloadIOError(
        "read", "/swap", errno.EIO, offset=4096, nbytes=8192, nbytes_done=512, hint="look at the kernel log"
    )
    assert str(error) == (
        "cannot read /swap: 8192 bytes at offset 4096, 512 done: Input/output error (errno 5); look at the kernel log"
    )
    assert (error.errno, error.filename, error.offset, error.nbytes_done) == (errno.EIO, "/swap", 4096, 512)


def test_an_io_error_without_a_transfer_says_only_what_is_known() -> None:
    assert str(OffloadIOError("open", "/swap", errno.ENOENT)) == (
        "cannot open /swap: No such file or directory (errno 2)"
    )


def test_an_io_error_survives_the_way_between_processes() -> None:
    error = OffloadIOError("write", "/swap", errno.ENOSPC, offset=0, nbytes=4096, hint="free some")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.errno, copy.nbytes) == (str(error), errno.ENOSPC, 4096)
