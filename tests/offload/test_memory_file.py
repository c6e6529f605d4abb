"""Memory files: one copy, written by one process, that ends with its last user."""

from __future__ import annotations

import dataclasses
import errno
import gc
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemini.errors import OutOfTierMemoryError
from gemini.offload.arena import HostArena
from gemini.offload.memory_file import MemoryFile
from gemini.tiers import MemoryTier, TierLedger

PAGE = 4096
HOST = MemoryTier.HOST


@contextmanager
def writer_and_reader(*, is_read_in_place: bool = True) -> Iterator[tuple[MemoryFile, MemoryFile]]:
    """Yield a file of three pages as its writer and as another user has it."""
    writer = MemoryFile.create()
    reader = MemoryFile.open(writer.address)
    try:
        for file in (writer, reader):
            file.lay_out(3 * PAGE, is_read_in_place=is_read_in_place)
        yield writer, reader
    finally:
        writer.close()
        reader.close()


@contextmanager
def file_length_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def num_mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:gemini")


@pytest.mark.parametrize("is_read_in_place", [True, False])
def test_what_the_writer_writes_all_read(is_read_in_place: bool) -> None:
    with writer_and_reader(is_read_in_place=is_read_in_place) as (writer, reader):
        for value, nbytes in ((3, PAGE), (5, 2 * PAGE)):
            source, seen = writer.take(nbytes), reader.take(nbytes)
            assert seen.writer is None
            assert source.writer is not None
            source.writer.fill_(value)
            assert seen.view.unique().tolist() == source.view.unique().tolist() == [value]
            assert seen.view.untyped_storage().data_ptr() == seen.view.data_ptr()
            assert seen.view.numel() == nbytes


def test_a_readers_writes_stay_its_own_until_it_is_refreshed() -> None:
    with writer_and_reader() as (writer, reader):
        source, seen = writer.take(2 * PAGE), reader.take(2 * PAGE)
        assert source.writer is not None
        seen.view[:PAGE] = 9
        source.writer.fill_(3)
        assert source.view.unique().tolist() == [3]
        assert seen.view[:PAGE].unique().tolist() == [9]
        assert seen.view[PAGE:].unique().tolist() == [3]
        seen.refresh()
        assert seen.view.unique().tolist() == [3]


def test_a_sealed_file_is_written_through_what_was_taken_and_in_no_other_way() -> None:
    with writer_and_reader() as (writer, reader):
        source = writer.take(PAGE)
        reader.seal()  # is not its to do
        writer.seal()
        descriptor = reader.address.descriptor
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, PAGE)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, PAGE, flags=mmap.MAP_SHARED)
        assert source.writer is not None
        source.writer.fill_(4)
        assert reader.take(PAGE).view.unique().tolist() == [4]


def test_another_file_at_the_address_is_refused() -> None:
    with writer_and_reader() as (writer, _):
        address = dataclasses.replace(writer.address, inode=writer.address.inode + 1)
        with pytest.raises(OSError, match="another file is there") as caught:
            MemoryFile.open(address)
    assert caught.value.errno == errno.ESTALE


def test_a_closed_file_cannot_be_opened_and_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with writer_and_reader() as (writer, _):
        address = writer.address
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(FileNotFoundError):
        MemoryFile.open(address)


def test_memory_goes_with_the_last_view() -> None:
    with writer_and_reader() as (writer, reader):
        kept = writer.take(PAGE).view[:8]
        reader.take(PAGE)
    assert num_mapped() == 1
    assert kept.sum() == 0
    del kept
    assert num_mapped() == 0


@pytest.mark.parametrize(("num_users", "share"), [(1, 3 * PAGE), (2, 2 * PAGE), (3, PAGE), (4, PAGE)])
def test_the_arena_charges_a_share(num_users: int, share: int) -> None:
    ledger = TierLedger({HOST: None})
    arena = HostArena(ledger)
    with writer_and_reader() as (_, reader):
        reader.num_users = num_users
        buffer = arena.take_shared(reader, 3 * PAGE, "shared weights")
        assert ledger.by_purpose(HOST) == {"shared weights": share}
        arena.free(buffer.view)
        assert ledger.held_nbytes(HOST) == 0


@pytest.mark.parametrize("limit_nbytes", [PAGE])
def test_a_machine_without_room_is_an_error_and_not_a_signal(limit_nbytes: int) -> None:
    ledger = TierLedger({HOST: None})
    with (
        writer_and_reader() as (writer, _),
        file_length_limit(limit_nbytes),
        pytest.raises(OutOfTierMemoryError, match=r"refused 12\.00 KiB of host memory for shared weights"),
    ):
        HostArena(ledger).take_shared(writer, 3 * PAGE, "shared weights")
    assert ledger.held_nbytes(HOST) == 0
