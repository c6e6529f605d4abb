"""A staged directory is locked, empty at first, and has its name or is not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from gemini.errors import OffloadIOError
from gemini.files.durable import StagedDirectory, write_durably


def nothing() -> None:
    """Clear up nothing."""


def names(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_a_published_directory_has_its_name_and_all_its_files(tmp_path: Path) -> None:
    staged = StagedDirectory(tmp_path / "run", ".new")
    staged.begin(nothing)
    assert names(tmp_path) == ["run", "run/.new"]
    write_durably(staged.place / "file", b"content")
    staged.publish(tmp_path / "run" / "first")
    staged.release()
    assert names(tmp_path / "run") == ["first", "first/file"]
    assert (tmp_path / "run" / "first" / "file").read_bytes() == b"content"


def test_what_was_left_behind_is_removed_after_everything_else_was_cleared_up(tmp_path: Path) -> None:
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "half").touch()
    seen: list[list[str]] = []
    staged = StagedDirectory(tmp_path, ".new")
    staged.begin(lambda: seen.append(names(tmp_path)))
    assert seen == [[".new", ".new/half"]]
    assert names(tmp_path) == [".new"]


def test_the_parent_is_locked_until_it_is_released(tmp_path: Path) -> None:
    first, second = StagedDirectory(tmp_path, ".new"), StagedDirectory(tmp_path, ".other")
    first.begin(nothing)
    with pytest.raises(OffloadIOError, match="another process is saving into it"):
        second.begin(nothing)
    first.publish(tmp_path / "first")
    with pytest.raises(OffloadIOError, match="another process is saving into it"):
        second.begin(nothing)
    first.release()
    second.begin(nothing)
    second.abandon()
    assert names(tmp_path) == ["first"]


def test_a_directory_that_was_not_begun_is_not_abandoned(tmp_path: Path) -> None:
    first, second = StagedDirectory(tmp_path, ".new"), StagedDirectory(tmp_path, ".new")
    first.begin(nothing)
    second.abandon()
    assert names(tmp_path) == [".new"]
    first.abandon()
    assert names(tmp_path) == []


def test_clearing_up_that_fails_lets_others_begin(tmp_path: Path) -> None:
    def fail() -> None:
        raise OffloadIOError("complete", "here", errno.EIO)

    staged = StagedDirectory(tmp_path, ".new")
    with pytest.raises(OffloadIOError, match="cannot complete here"):
        staged.begin(fail)
    assert names(tmp_path) == []
    StagedDirectory(tmp_path, ".new").begin(nothing)


def test_a_parent_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OffloadIOError, match="cannot create directory .*/file: File exists"):
        StagedDirectory(tmp_path / "file", ".new").begin(nothing)


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"first")
    with pytest.raises(OffloadIOError, match="cannot write .*/file: File exists"):
        write_durably(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
