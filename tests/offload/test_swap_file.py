"""Swap files are locked by their name: what is locked is the file at the path, whatever others do meanwhile."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gemini.offload.swap_file import take_file, take_kept_file


@pytest.mark.parametrize("take", [take_file, take_kept_file])
def test_a_file_that_its_owner_removes_before_it_is_locked_is_opened_again(
    take: Callable[[Path], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gemini-rank0.swap"
    flock, calls = fcntl.flock, []

    def flock_after_removal(fd: int, operation: int) -> None:
        if not calls:
            os.unlink(path)
        calls.append(fd)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    fd = take(path)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(fd), os.stat(path))
    os.close(fd)
