"""The swap file: who owns it, what it reserves, and that it comes and goes cleanly."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults import FAILING_DEVICE, flip_bit, redirected
from hypothesis import given, settings
from hypothesis import strategies as st

from gemini.config import NVMeConfig
from gemini.errors import CorruptRecordError, OffloadIOError, OutOfTierMemoryError
from gemini.offload.extents import Extent
from gemini.offload.io import available_backends, empty_aligned
from gemini.offload.store import DiskStore, ExtentTransfer
from gemini.offload.swap_file import SwapHeader

pytestmark = pytest.mark.processes


MIB = 1 << 20
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def config(path: Path, *, engine: str = "auto", **options: object) -> NVMeConfig:
    return NVMeConfig(path=path, budget="64MiB", engine=engine, **options)  # type: ignore[arg-type]


@pytest.fixture(params=available_backends(), ids=lambda backend: backend.value)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore(config(tmp_path, engine=request.param.value), capacity_nbytes=8 * MIB) as made:
        assert made.backend is request.param
        yield made


def random_floats(numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel))


# ---------------------------------------------------------------------- bytes


def test_extents_keep_their_bytes(store: DiskStore) -> None:
    sources = [random_floats(numel) for numel in (1, 1023, 1024, 100_000)]
    extents = [store.allocate(source.numel() * 4) for source in sources]
    for ticket in store.write_batch(
        [ExtentTransfer(extent=e, buffer=s) for e, s in zip(extents, sources, strict=True)]
    ):
        ticket.wait()
    targets = [torch.zeros_like(source) for source in sources]
    for ticket in store.read_batch([ExtentTransfer(extent=e, buffer=t) for e, t in zip(extents, targets, strict=True)]):
        ticket.wait()
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_extent_is_found_in_the_file_behind_the_header(store: DiskStore) -> None:
    store.allocate(4096)
    extent = store.allocate(5)
    store.write(extent, torch.tensor([7, 8, 9], dtype=torch.uint8), offset=2).wait()
    assert store.path.read_bytes()[4096 + extent.offset + 2 :][:3] == b"\x07\x08\x09"


def test_part_of_an_extent_is_read(store: DiskStore) -> None:
    extent = store.allocate(8192)
    store.write(extent, torch.arange(2048, dtype=torch.int32)).wait()
    part = torch.zeros(4, dtype=torch.int32)
    store.read(extent, part, offset=4096).wait()
    assert part.tolist() == [1024, 1025, 1026, 1027]


def test_aligned_transfers_go_directly_where_the_file_system_allows(store: DiskStore) -> None:
    source, target = empty_aligned(MIB, torch.float32).fill_(3), empty_aligned(MIB, torch.float32)
    extent = store.allocate(4 * MIB)
    store.write(extent, source).wait()
    store.read(extent, target).wait()
    assert torch.equal(source, target)
    assert store.stats().nbytes_read == 4 * MIB
    assert store.stats().nbytes_written == 4 * MIB + 4096


def test_page_cache_is_used_when_asked_for(tmp_path: Path) -> None:
    with DiskStore(config(tmp_path, direct=False), capacity_nbytes=MIB) as store:
        assert not store.is_direct
        extent = store.allocate(4096)
        store.write(extent, empty_aligned(4096, torch.uint8).fill_(1)).wait()
        target = torch.zeros(4096, dtype=torch.uint8)
        store.read(extent, target).wait()
        assert target.sum() == 4096


# ---------------------------------------------------------------------- bounds


def test_extents_run_out_with_numbers(store: DiskStore) -> None:
    extent = store.allocate(8 * MIB)
    with pytest.raises(OutOfTierMemoryError, match=r"8\.00 MiB of 8\.00 MiB are held"):
        store.allocate(1)
    store.free(extent)
    assert store.held_nbytes == 0
    assert store.allocate(8 * MIB) == extent


@pytest.mark.parametrize(("numel", "offset"), [(4097, 0), (1, 4096), (1, -1), (4096, 1)])
def test_transfers_outside_their_extent_are_refused(store: DiskStore, numel: int, offset: int) -> None:
    extent = store.allocate(4096)
    tensor = torch.zeros(numel, dtype=torch.uint8)
    for move in (store.read, store.write):
        with pytest.raises(ValueError, match="expected a range within its 4096 bytes"):
            move(extent, tensor, offset=offset)


def test_freed_and_invented_extents_are_refused(store: DiskStore) -> None:
    extent = store.allocate(4096)
    store.free(extent)
    for bad in (extent, Extent(4096, 4096)):
        with pytest.raises(ValueError, match="not allocated"):
            store.write(bad, torch.zeros(1))
        with pytest.raises(ValueError, match="not allocated"):
            store.free(bad)


def test_one_bad_transfer_stops_its_whole_batch(store: DiskStore) -> None:
    extent = store.allocate(4096)
    batch = [ExtentTransfer(extent=extent, buffer=torch.ones(numel)) for numel in (1, 1025)]
    before = store.stats()
    with pytest.raises(ValueError, match="4100 bytes"):
        store.write_batch(batch)
    assert store.stats() == before


# ---------------------------------------------------------------------- the file


def test_header_has_the_documented_layout(tmp_path: Path) -> None:
    begin_s = time.time()
    with DiskStore(config(tmp_path), capacity_nbytes=8 * MIB) as store:
        end_s = time.time()
        block = store.path.read_bytes()[:4096]
    magic, version, pid, created_s, capacity, host = struct.unpack("<8sIIdQ64s", block[:96])
    assert (magic, version, pid, capacity) == (b"GEMSWAP\0", 2, os.getpid(), 8 * MIB)
    assert begin_s <= created_s <= end_s
    assert host.rstrip(b"\0").decode() == socket.gethostname()
    assert block[96:] == bytes(4000)


def test_space_is_reserved_at_construction(store: DiskStore) -> None:
    state = store.path.stat()
    assert state.st_size == 8 * MIB + 4096
    assert state.st_blocks * 512 >= state.st_size
    assert state.st_mode & 0o777 == 0o600


def test_file_is_named_after_the_rank_and_removed_at_close(tmp_path: Path) -> None:
    with DiskStore(config(tmp_path), capacity_nbytes=1, rank=3) as store:
        assert os.listdir(tmp_path) == ["gemini-rank3.swap"]
        assert store.capacity_nbytes == 4096
        with DiskStore(config(tmp_path), capacity_nbytes=0, rank=4):
            assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == []


def test_closing_with_transfers_under_way_is_clean(store: DiskStore) -> None:
    extent = store.allocate(8 * MIB)
    source = empty_aligned(2 * MIB, torch.float32)
    tickets = [store.write(extent, source) for _ in range(100)]
    store.close()
    assert not store.path.exists()
    for ticket in tickets:
        try:
            ticket.wait()
        except OffloadIOError as error:
            assert error.errno == errno.ECANCELED  # noqa: PT017
    store.close()
    with pytest.raises(OffloadIOError, match="it was closed before"):
        store.read(extent, source)


def test_store_that_is_forgotten_removes_its_file(tmp_path: Path) -> None:
    DiskStore(config(tmp_path), capacity_nbytes=MIB)
    assert os.listdir(tmp_path) == []


def test_opening_and_closing_leaks_nothing(tmp_path: Path) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    DiskStore(config(tmp_path), capacity_nbytes=MIB).close()
    before = count()
    for _ in range(10):
        DiskStore(config(tmp_path), capacity_nbytes=MIB).close()
        with pytest.raises(OutOfTierMemoryError):
            DiskStore(config(tmp_path), capacity_nbytes=65 * MIB)
    files, tasks = count()
    assert files <= before[0]
    assert tasks <= before[1] + 1  # the kernel's own io_uring threads may linger


# ---------------------------------------------------------------------- owners


def test_second_store_in_the_directory_is_refused(store: DiskStore) -> None:
    owner = re.escape(f"process {os.getpid()} on {socket.gethostname()}")
    expected = f"{owner} uses it now: give this run another directory, or wait until that process has ended"
    with pytest.raises(OffloadIOError, match=expected) as caught:
        DiskStore(config(store.path.parent), capacity_nbytes=MIB)
    assert caught.value.errno == errno.EBUSY
    assert str(store.path) in str(caught.value)
    extent = store.allocate(4)
    store.write(extent, torch.ones(1)).wait()  # the owner did not notice


def fork_child(work: Callable[[int], None]) -> tuple[int, str]:
    """Start a child that calls work(fd of a pipe) and exits; returns its pid and the first line it wrote."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            work(write_end)
        except BaseException:
            os.write(write_end, traceback.format_exc().encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        return pid, pipe.readline()


def open_and_stay(path: Path) -> Callable[[int], None]:
    def work(fd: int) -> None:
        store = DiskStore(config(path, engine="threads"), capacity_nbytes=MIB)
        os.write(fd, b"ready\n")
        signal.pause()
        store.close()

    return work


@forks
def test_store_of_another_process_is_respected_until_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pid, line = fork_child(open_and_stay(tmp_path))
    assert line == "ready\n"
    with pytest.raises(OffloadIOError, match=f"process {pid} on .* uses it now"):
        DiskStore(config(tmp_path), capacity_nbytes=MIB)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.listdir(tmp_path) == ["gemini-rank0.swap"]
    with caplog.at_level(logging.INFO), DiskStore(config(tmp_path), capacity_nbytes=2 * MIB) as store:
        assert f"its owner, process {pid} on {socket.gethostname()}, is gone" in caplog.text
        assert store.path.stat().st_size == 2 * MIB + 4096
    assert os.listdir(tmp_path) == []


@forks
def test_child_of_a_killed_owner_does_not_hold_its_file(tmp_path: Path) -> None:
    def open_and_fork(fd: int) -> None:
        with DiskStore(config(tmp_path, engine="threads"), capacity_nbytes=MIB):
            child = os.fork()
            if child:
                os.write(fd, f"{child}\n".encode())
            signal.pause()

    pid, line = fork_child(open_and_fork)
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        DiskStore(config(tmp_path), capacity_nbytes=MIB).close()
        os.kill(int(line), 0)  # the child lives
    finally:
        os.kill(int(line), signal.SIGKILL)
    assert os.listdir(tmp_path) == []


@forks
def test_forked_child_leaves_the_parents_file_alone(store: DiskStore) -> None:
    def close_in_child(fd: int) -> None:
        store.close()
        os.write(fd, b"closed\n")

    pid, line = fork_child(close_in_child)
    os.waitpid(pid, 0)
    assert line == "closed\n"
    assert store.path.exists()
    extent = store.allocate(4)
    store.write(extent, torch.ones(1)).wait()
    with pytest.raises(OffloadIOError, match="uses it now"):
        DiskStore(config(store.path.parent), capacity_nbytes=MIB)


def test_empty_file_of_a_killed_owner_is_taken(tmp_path: Path) -> None:
    (tmp_path / "gemini-rank0.swap").touch()
    with DiskStore(config(tmp_path), capacity_nbytes=MIB) as store:
        assert store.path.stat().st_size == MIB + 4096


def test_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "gemini-rank0.swap"
    precious.write_bytes(b"thesis" * 1000)
    with pytest.raises(OffloadIOError, match="not a swap file: move it away"):
        DiskStore(config(tmp_path), capacity_nbytes=MIB)
    assert precious.read_bytes() == b"thesis" * 1000


def test_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "gemini-rank0.swap").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OffloadIOError, match="symbolic link"):
        DiskStore(config(tmp_path), capacity_nbytes=MIB)


@pytest.mark.parametrize("version", [1, 3])
def test_file_of_another_version_that_nobody_holds_is_taken(
    tmp_path: Path, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    stale = tmp_path / "gemini-rank0.swap"
    stale.write_bytes(struct.pack("<8sIIdQ", b"GEMSWAP\0", version, 1, 0.0, 0).ljust(8192, b"x"))
    with caplog.at_level(logging.INFO), DiskStore(config(tmp_path), capacity_nbytes=MIB):
        assert "its owner, a process of another version, is gone" in caplog.text
    assert not stale.exists()


@pytest.mark.parametrize("block", [b"", b"GEMSWAP\0", struct.pack("<8sIIdQ", b"GEMSWAP\0", 1, 1, 0.0, 0).ljust(4096)])
def test_other_blocks_are_no_headers(block: bytes) -> None:
    assert SwapHeader.unpack(block) is None


def test_header_survives_packing() -> None:
    header = SwapHeader(pid=12, created_s=1.5, capacity_nbytes=1 << 40, host="node-7")
    assert SwapHeader.unpack(header.pack()) == header


@pytest.mark.parametrize(("host", "kept"), [("", ""), ("n" * 100, "n" * 64), ("k\u00fc" * 40, "k\u00fc" * 21 + "k")])
def test_a_host_name_is_cut_to_what_fits(host: str, kept: str) -> None:
    found = SwapHeader.unpack(SwapHeader(pid=1, created_s=0, capacity_nbytes=0, host=host).pack())
    assert found is not None
    assert found.host == kept


def headers_and_noise() -> st.SearchStrategy[bytes]:
    """Blocks from plain noise to headers of which some bytes have changed."""
    good = SwapHeader(pid=7, created_s=2.0, capacity_nbytes=4096, host="node").pack()
    changes = st.lists(st.tuples(st.integers(0, 110), st.integers(0, 255)), max_size=8)

    def change(made: list[tuple[int, int]]) -> bytes:
        block = bytearray(good)
        for position, byte in made:
            block[position] = byte
        return bytes(block)

    cut = st.tuples(changes.map(change), st.integers(0, 4096)).map(lambda pair: pair[0][: pair[1]])
    behind_magic = st.binary(max_size=200).map(lambda rest: b"GEMSWAP\0" + rest)
    return st.one_of(st.binary(max_size=200), behind_magic, changes.map(change), cut)


@settings(max_examples=500)
@given(block=headers_and_noise())
def test_no_block_breaks_the_reader_of_headers(block: bytes) -> None:
    header = SwapHeader.unpack(block)
    if header is None:
        is_of_this_version = block.startswith(b"GEMSWAP\0\2\0\0\0") and len(block) >= 96
        assert not is_of_this_version
        return
    assert header.owner.isprintable()
    assert 0 <= header.pid < 1 << 32
    assert 0 <= header.capacity_nbytes < 1 << 64
    assert len(header.pack()) == 4096


@settings(max_examples=100)
@given(block=headers_and_noise())
def test_a_found_file_is_taken_or_left_but_never_half_of_both(block: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory) / "gemini-rank0.swap"
        found.write_bytes(block)
        if block and not block.startswith(b"GEMSWAP\0"):
            with pytest.raises(OffloadIOError, match="not a swap file"):
                DiskStore(config(Path(directory), engine="threads"), capacity_nbytes=4096)
            assert found.read_bytes() == block
        else:
            DiskStore(config(Path(directory), engine="threads"), capacity_nbytes=4096).close()
            assert not found.exists()


# ---------------------------------------------------------------------- verified


def test_a_changed_record_is_named_by_file_and_record(tmp_path: Path) -> None:
    with DiskStore(config(tmp_path, verify=True), capacity_nbytes=MIB) as store:
        extent = store.allocate(8192, record="state of chunk 3 (block.weight and 2 more)")
        source = empty_aligned(8192, torch.uint8).fill_(7)
        store.write(extent, source).wait()
        flip_bit(store.path, 4096 + extent.offset + 5000)
        record = r"gemini-rank0\.swap, state of chunk 3 \(block\.weight and 2 more\)"
        message = f"{record}: the CRC-32C of the block of 4096 bytes at offset 8192 "
        ticket = store.read(extent, source)
        with pytest.raises(CorruptRecordError, match=message):
            ticket.wait()


def test_a_changed_record_is_taken_as_it_is_where_nobody_asked_to_verify(tmp_path: Path) -> None:
    with DiskStore(config(tmp_path), capacity_nbytes=MIB) as store:
        extent = store.allocate(4096)
        source = empty_aligned(4096, torch.uint8).fill_(7)
        store.write(extent, source).wait()
        flip_bit(store.path, 4096 + extent.offset)
        store.read(extent, source).wait()
        assert source[0] != 7


def test_a_failed_transfer_names_its_record(tmp_path: Path) -> None:
    with DiskStore(config(tmp_path), capacity_nbytes=MIB) as store:
        extent = store.allocate(4096, record="gradients of chunk 1 (a)")
        with (
            redirected(store.path, FAILING_DEVICE),
            pytest.raises(OffloadIOError, match="gradients of chunk 1") as caught,
        ):
            store.read(extent, torch.zeros(4096, dtype=torch.uint8)).wait()
        assert caught.value.errno in (errno.EIO, errno.EINVAL)


# ---------------------------------------------------------------------- refusals


def test_capacity_above_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutOfTierMemoryError, match=r"64\.00 MiB \(67108865 bytes\) are needed but NVMeConfig\.budget"):
        DiskStore(config(tmp_path), capacity_nbytes=64 * MIB + 1)
    assert os.listdir(tmp_path) == []


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(OffloadIOError, match=r"/missing: No such file.*create the directory first"):
        DiskStore(config(tmp_path / "missing"), capacity_nbytes=MIB)


def test_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OffloadIOError, match=r"NVMeConfig\.path must name a directory"):
            DiskStore(config(path), capacity_nbytes=MIB)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a file system below tmp_path: mount("-t", "tmpfs", ...)."""
    point = tmp_path / "mounted"
    point.mkdir()

    def make(*arguments: str) -> Path:
        command = ["mount", *arguments, str(point)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        return point

    yield make
    subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)


def test_read_only_file_system_is_refused_with_a_remedy(mount: Callable[..., Path]) -> None:
    point = mount("-t", "tmpfs", "-o", "ro", "tmpfs")
    with pytest.raises(OffloadIOError, match=r"mounted read-only; name a writable directory") as caught:
        DiskStore(config(point), capacity_nbytes=MIB)
    assert caught.value.errno == errno.EROFS


def test_full_file_system_is_refused_with_numbers_and_left_empty(mount: Callable[..., Path]) -> None:
    point = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    expected = r"needs 4\.00 MiB \(4198400 bytes\), the file system has 1\.00 MiB \(1048576 bytes\) free"
    with pytest.raises(OffloadIOError, match=expected) as caught:
        DiskStore(config(point), capacity_nbytes=4 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(point) == []


def test_file_system_without_direct_io_is_used_after_a_warning(
    mount: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    point = mount("-t", "ramfs", "ramfs")  # knows neither O_DIRECT nor fallocate
    with DiskStore(config(point), capacity_nbytes=MIB) as store:
        assert not store.is_direct
        assert "does not take O_DIRECT" in caplog.text
        extent = store.allocate(4096)
        store.write(extent, empty_aligned(4096, torch.uint8).fill_(1)).wait()
        target = torch.zeros(4096, dtype=torch.uint8)
        store.read(extent, target).wait()
        assert target.sum() == 4096
