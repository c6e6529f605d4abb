"""Every backend moves exactly the bytes asked for, reports every failure and never hangs."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S, wait_until

from gemini import _native
from gemini.errors import ConfigError, OffloadIOError
from gemini.offload.io import (
    IoBackend,
    IoBuffer,
    IoEngine,
    IoFile,
    IoOpenFlag,
    IoOperation,
    IoRequest,
    available_backends,
    choose_backend,
    empty_aligned,
)
from gemini.offload.io_backends import native_number

pytestmark = pytest.mark.processes


BACKENDS = available_backends()
READ_WRITE = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.CREATE
NEW_DIRECT = READ_WRITE | IoOpenFlag.DIRECT


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> IoBackend:
    assert isinstance(request.param, IoBackend)
    return request.param


@pytest.fixture
def engine(backend: IoBackend) -> Iterator[IoEngine]:
    with IoEngine(backend, queue_depth=8, num_threads=3) as made:
        yield made


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return empty_aligned(nbytes, torch.uint8).copy_(random_bytes(nbytes, seed))


def in_forked_child(function: Callable[[], str]) -> str:
    """Return what the function returns in a child process, which must not use torch's own threads."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = function()
        except BaseException:
            text = traceback.format_exc()
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text


# ---------------------------------------------------------------------- exact bytes


@pytest.mark.parametrize("nbytes", [0, 1, 511, 4095, 4096, 4097, 8192, 1 << 20, (3 << 20) + 5])
def test_write_then_read_gives_the_bytes(engine: IoEngine, tmp_path: Path, nbytes: int) -> None:
    for make, offset in itertools.product((aligned_bytes, random_bytes), (0, 7, 4096)):
        source, target = make(nbytes, 1), make(nbytes, 2)
        file = engine.open(tmp_path / "f", NEW_DIRECT | IoOpenFlag.TRUNCATE)
        file.write(source, offset).wait()
        assert (tmp_path / "f").read_bytes()[offset:] == source.numpy().tobytes()
        file.read(target, offset).wait()
        assert torch.equal(target, source)
        file.close()
    assert engine.stats().nbytes_read == engine.stats().nbytes_written == 6 * nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_any_dtype_and_shape_travels(engine: IoEngine, tmp_path: Path, dtype: torch.dtype) -> None:
    source = random_bytes(16 * 24).remainder(2).view(torch.bool if dtype is torch.bool else torch.uint8).to(dtype)
    source = source.reshape(4, 4, 24)
    target = torch.zeros_like(source)
    file = engine.open(tmp_path / "f", READ_WRITE)
    file.write(source, 3).wait()
    file.read(target, 3).wait()
    assert torch.equal(target, source)


def test_memory_without_tensor_travels(engine: IoEngine, tmp_path: Path) -> None:
    memory = torch.arange(100, dtype=torch.uint8)
    middle = IoBuffer(address=memory.data_ptr() + 10, nbytes=20, owner=memory)
    engine.open(tmp_path / "f", READ_WRITE).write(middle, 0).wait()
    assert (tmp_path / "f").read_bytes() == bytes(range(10, 30))


def test_more_requests_than_queue_depth_all_complete(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", NEW_DIRECT)
    order = list(range(300))
    random.Random(0).shuffle(order)
    # Every third request is not aligned, so that both descriptors work on one file at the same time.
    sources = {i: aligned_bytes(4096 if i % 3 else 4096 - 13, i) for i in order}
    write = [IoRequest(file=file, operation=IoOperation.WRITE, buffer=sources[i], offset=i * 4096) for i in order]
    for ticket in engine.submit(write):
        ticket.wait()
    on_disk = (tmp_path / "f").read_bytes()
    assert all(on_disk[i * 4096 :][: len(sources[i])] == sources[i].numpy().tobytes() for i in order)

    targets = {i: aligned_bytes(len(sources[i])) for i in order}
    read = [IoRequest(file=file, operation=IoOperation.READ, buffer=targets[i], offset=i * 4096) for i in order]
    tickets = engine.submit(read)
    for ticket in reversed(tickets):
        ticket.wait()
    assert all(torch.equal(targets[i], sources[i]) for i in order)
    assert all(ticket.is_done() for ticket in tickets)


def test_several_threads_submit_and_wait(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", NEW_DIRECT)
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for round_number in range(15):
                offset = (worker * 15 + round_number) * 65536
                source = aligned_bytes(65536 - worker % 2, offset)
                file.write(source, offset).wait()
                target = torch.zeros_like(source)
                file.read(target, offset).wait()
                assert torch.equal(target, source)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_one_ticket_is_waited_for_by_many_threads(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", NEW_DIRECT)
    good, bad = file.write(aligned_bytes(8 << 20), 0), file.read(aligned_bytes(4096), 1 << 40)
    outcomes: list[int] = []

    def work() -> None:
        good.wait()
        try:
            bad.wait()
        except OffloadIOError as error:
            outcomes.append(error.errno or 0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [errno.ENODATA] * 8


def test_transfer_above_one_gib_is_split(backend: IoBackend, tmp_path: Path) -> None:
    nbytes = (1 << 30) + 8192
    marks = {0: b"head", (1 << 30) - 4: b"endofpiece"[:4], 1 << 30: b"next", nbytes - 4: b"tail"}
    with open(tmp_path / "f", "wb") as sparse:
        sparse.truncate(nbytes)
        for offset, mark in marks.items():
            sparse.seek(offset)
            sparse.write(mark)
    target = empty_aligned(nbytes, torch.uint8)
    with IoEngine(backend) as engine:
        engine.open(tmp_path / "f", IoOpenFlag.READ | IoOpenFlag.DIRECT).read(target, 0).wait()
        assert engine.stats().nbytes_read == nbytes
    assert all(target[offset : offset + 4].numpy().tobytes() == mark for offset, mark in marks.items())


# ---------------------------------------------------------------------- life of a ticket


def test_dropped_ticket_keeps_its_buffer_until_complete(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", NEW_DIRECT)
    for i in range(20):
        file.write(torch.full((1 << 20,), i, dtype=torch.uint8), i << 20)
    engine.close()
    on_disk = (tmp_path / "f").read_bytes()
    written = [on_disk[i << 20 : (i + 1) << 20] for i in range(20)]
    assert all(not piece or piece == bytes([i]) * len(piece) or set(piece) <= {0, i} for i, piece in enumerate(written))


def test_completed_tickets_hold_no_memory(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", READ_WRITE)
    buffers = [random_bytes(100) for _ in range(50)]
    remaining = [weakref.ref(buffer) for buffer in buffers]
    tickets = [file.write(buffer, 0) for buffer in buffers]
    del buffers
    for ticket in tickets:
        ticket.wait()
    gc.collect()
    assert [buffer for buffer in remaining if buffer() is not None] == []


def test_wait_gives_up_after_its_timeout(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", READ_WRITE)
    ticket = file.write(torch.empty(64 << 20, dtype=torch.uint8), 0)
    if not ticket.is_done():  # no disk is that fast, but none is forbidden to be
        with pytest.raises(TimeoutError, match=r"not complete after 1e-06 s"):
            ticket.wait(timeout_s=1e-6)
    ticket.wait(timeout_s=30)
    ticket.wait()
    assert ticket.is_done()


def test_closing_under_load_completes_or_cancels(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", NEW_DIRECT)
    source = aligned_bytes(4 << 20)
    tickets = engine.submit(
        [IoRequest(file=file, operation=IoOperation.WRITE, buffer=source, offset=(i % 16) << 22) for i in range(2000)]
    )
    outcomes: list[int | None] = []

    def work(index: int) -> None:
        try:
            tickets[index].wait()
            outcomes.append(0)
        except OffloadIOError as error:
            outcomes.append(error.errno)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 100, 1999, 1999)]
    for thread in threads:
        thread.start()
    tickets[0].wait()
    engine.close()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(outcomes) == 4
    assert set(outcomes) <= {0, errno.ECANCELED}
    assert errno.ECANCELED in outcomes
    tickets[0].wait()
    with pytest.raises(OffloadIOError, match="engine was closed before"):
        tickets[1999].wait()
    assert tickets[1999].is_done()


def test_closing_twice_and_from_two_threads_is_harmless(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", READ_WRITE)
    file.write(random_bytes(16 << 20), 0)
    threads = [threading.Thread(target=engine.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    engine.close()
    with pytest.raises(OffloadIOError, match="it was closed before"):
        file.write(random_bytes(1), 0)


def can_be_closed(file: IoFile) -> bool:
    """Close a file if no transfer of it is running; return whether it is closed."""
    try:
        file.close()
    except OffloadIOError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def test_forgotten_failure_is_logged_at_close(
    engine: IoEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "f").write_bytes(b"")
    file = engine.open(tmp_path / "f")
    ticket = file.read(random_bytes(10), 0)
    wait_until(lambda: can_be_closed(file))
    with caplog.at_level(logging.WARNING):
        engine.close()
    assert "1 unreported failed transfers" in caplog.text
    with pytest.raises(OffloadIOError, match="No data available"):
        ticket.wait()


def test_engine_dropped_without_close_lets_transfers_end(engine: IoEngine, tmp_path: Path) -> None:
    other = IoEngine(engine.backend, queue_depth=2)
    file = other.open(tmp_path / "f", NEW_DIRECT)
    file.write(aligned_bytes(4 << 20), 0)
    del other, file
    gc.collect()  # must neither crash nor hang


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(("length", "done"), [(10000, 5000), (8192, 4096 + 904)])
def test_reading_past_the_end_reports_what_was_there(engine: IoEngine, tmp_path: Path, length: int, done: int) -> None:
    (tmp_path / "f").write_bytes(bytes(range(250)) * 20)
    target = aligned_bytes(length)
    file = engine.open(tmp_path / "f", IoOpenFlag.READ | IoOpenFlag.DIRECT)
    ticket = file.read(target, 0)
    for _ in range(2):
        with pytest.raises(OffloadIOError, match=f"cannot read .*: {length} bytes at offset 0, 5000 done") as caught:
            ticket.wait()
    assert (caught.value.errno, caught.value.nbytes_done) == (errno.ENODATA, done)
    assert target[:5000].numpy().tobytes() == bytes(range(250)) * 20


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_file_size_limit_is_an_error_that_counts_what_was_written(backend: IoBackend, tmp_path: Path) -> None:
    aligned, plain = empty_aligned(1 << 18, torch.uint8), torch.empty(1 << 18)

    def write_beyond_limit() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        lines = []
        for buffer, offset in ((aligned, 0), (plain, 3)):
            with IoEngine(backend) as engine:
                ticket = engine.open(tmp_path / "f", NEW_DIRECT).write(buffer, offset)
                with pytest.raises(OffloadIOError, match="ulimit -f") as caught:
                    ticket.wait()
                lines.append(f"{caught.value.errno} {caught.value.nbytes_done}")
        return ", ".join(lines)

    assert in_forked_child(write_beyond_limit) == f"{errno.EFBIG} 65536, {errno.EFBIG} 65533"


def test_full_file_system_is_an_error_with_a_hint(small_mount: Path) -> None:
    for backend in BACKENDS:
        with IoEngine(backend) as engine:
            file = engine.open(small_mount / "f", READ_WRITE | IoOpenFlag.TRUNCATE)
            with pytest.raises(OffloadIOError, match=r"No space left.*free space on that file system") as caught:
                file.write(random_bytes(4 << 20), 0).wait()
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.nbytes_done == (small_mount / "f").stat().st_size
            assert 0 < caught.value.nbytes_done <= 1 << 20


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    point = tmp_path / "small"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_opening_what_is_not_there_names_it(engine: IoEngine, tmp_path: Path) -> None:
    with pytest.raises(OffloadIOError, match=r"cannot open .*/missing: No such file") as caught:
        engine.open(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(OffloadIOError, match="Is a directory"):
        engine.open(tmp_path, READ_WRITE)


def test_writing_to_a_file_opened_for_reading_is_refused(engine: IoEngine, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(OffloadIOError, match="not opened for this operation"):
        engine.open(tmp_path / "f", IoOpenFlag.READ).write(random_bytes(1), 0)


def test_closed_file_is_refused(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", READ_WRITE)
    file.write(random_bytes(10), 0).wait()
    file.sync()
    file.close()
    for use in (file.close, file.sync, lambda: file.read(random_bytes(1), 0)):
        with pytest.raises(OffloadIOError, match="Bad file descriptor"):
            use()


def test_bad_buffers_are_refused_before_anything_starts(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", READ_WRITE)
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    for buffer in (torch.zeros(4, 4).t(), torch.zeros(4, device="meta"), torch.zeros(4).to_sparse(), freed):
        with pytest.raises(ValueError, match="I/O needs a"):
            engine.submit(
                [
                    IoRequest(file=file, operation=IoOperation.WRITE, buffer=each, offset=0)
                    for each in (torch.zeros(1), buffer)
                ]
            )
    with pytest.raises(ValueError, match="offset and length >= 0"):
        file.write(torch.zeros(1), -1)
    assert (tmp_path / "f").stat().st_size == 0


def test_file_of_another_engine_is_refused(engine: IoEngine, tmp_path: Path) -> None:
    with IoEngine(IoBackend.THREADS) as other:
        file = other.open(tmp_path / "f", READ_WRITE)
        with pytest.raises(ValueError, match="opened by another engine"):
            engine.submit([IoRequest(file=file, operation=IoOperation.READ, buffer=torch.zeros(1), offset=0)])


@pytest.mark.parametrize("queue_depth", [0, 4097])
def test_impossible_queue_depth_is_refused(queue_depth: int) -> None:
    with pytest.raises(OffloadIOError, match="Invalid argument"):
        IoEngine(IoBackend.THREADS, queue_depth=queue_depth)


# ---------------------------------------------------------------------- hostile kernels

HOSTILE_LIBC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
/* Every transfer is cut short, every other call is refused at first, batches are taken one by one. */
static __thread unsigned count;
static size_t less(size_t n) {
    if (n % 4096 == 0) return n > 4096 ? (n - n / 3) & ~4095ul : n; /* may be direct: keep it legal */
    return n > 12288 && count % 3 ? n / 3 : n - n / 3;
}
static int refuse(int how) { if (count++ % 2) return 0; errno = how; return 1; }
/* With REFUSE_DIRECT, O_DIRECT is accepted at open but not in use. */
static int refuse_direct(int fd) {
    if (!getenv("REFUSE_DIRECT") || !(fcntl(fd, F_GETFL) & O_DIRECT)) return 0;
    errno = EINVAL;
    return 1;
}
typedef ssize_t (*mover)(int, void*, size_t, off_t);
ssize_t pread(int fd, void* b, size_t n, off_t o) {
    if (refuse(count % 4 ? EAGAIN : EINTR) || refuse_direct(fd)) return -1;
    return ((mover)dlsym(RTLD_NEXT, "pread"))(fd, b, less(n), o);
}
ssize_t pread64(int fd, void* b, size_t n, off_t o) { return pread(fd, b, n, o); }
ssize_t pwrite(int fd, const void* b, size_t n, off_t o) {
    if (refuse(count % 4 ? EAGAIN : EINTR) || refuse_direct(fd)) return -1;
    return ((mover)dlsym(RTLD_NEXT, "pwrite"))(fd, (void*)b, less(n), o);
}
ssize_t pwrite64(int fd, const void* b, size_t n, off_t o) { return pwrite(fd, b, n, o); }
long syscall(long number, ...) {
    va_list list;
    va_start(list, number);
    long a[6];
    for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_io_submit) {
        if (refuse(count % 4 ? EAGAIN : EINTR)) return -1;
        a[1] = a[1] > 0 ? 1 : a[1];
        struct iocb* block = ((struct iocb**)a[2])[0];
        if (refuse_direct(block->aio_fildes)) return -1;
        block->aio_nbytes = less(block->aio_nbytes);
    }
    if (number == SYS_io_uring_enter) {
        if (refuse(count % 4 ? EAGAIN : count % 8 ? EBUSY : EINTR)) return -1;
        a[1] = a[1] > 0 ? 1 : a[1];
    }
    return ((long (*)(long, ...))dlsym(RTLD_NEXT, "syscall"))(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
"""


# Without torch, whose import would take most of the time.
HOSTILE_PROGRAM = """
import importlib.util, random, sys
module, directory, *backends = sys.argv[1:]
spec = importlib.util.spec_from_file_location("gemini._native", module)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
ffi, lib = native.ffi, native.lib

sizes = [1, 2, 4095, 4096, 8192, 65536, 65537, 1048574] * 2 + [1 << 19]
starts = [(i << 20) + i % 3 for i in range(len(sizes))]
sources = [random.Random(i).randbytes(size) for i, size in enumerate(sizes)]
raw = ffi.new("char[]", (len(sizes) + 1) << 20)
base = int(ffi.cast("uintptr_t", raw)) + 4095 & ~4095
buffers = [ffi.cast("char *", base + (i << 20)) for i in range(len(sizes))]

def move(io, file, op):
    requests = ffi.new("gn_io_request[]", list(zip([file] * 99, [op] * 99, buffers, sizes, starts)))
    tickets = ffi.new("uint64_t[]", len(sizes))
    assert lib.gn_io_submit(io, requests, len(sizes), tickets) == 0
    for ticket in tickets:
        assert lib.gn_io_wait(io, ticket, 20 * 10**9, ffi.NULL) == 0

for backend in map(int, backends):
    io = ffi.new("gn_io **")
    assert lib.gn_io_create(io, backend, 4, 3) == 0
    file = lib.gn_io_open(io[0], f"{directory}/{backend}".encode(), 1 | 2 | 4 | 16)
    for buffer, source in zip(buffers, sources):
        ffi.memmove(buffer, source, len(source))
    move(io[0], file, lib.GN_IO_WRITE)
    on_disk = open(f"{directory}/{backend}", "rb").read()
    assert all(on_disk[at : at + len(source)] == source for at, source in zip(starts, sources))
    ffi.memmove(raw, bytes(len(raw)), len(raw))
    move(io[0], file, lib.GN_IO_READ)
    assert all(ffi.buffer(buffer, len(source))[:] == source for buffer, source in zip(buffers, sources))
    counts = ffi.new("int64_t[2]")
    assert lib.gn_io_stats(io[0], counts, counts + 1) == 0
    assert counts[0] == counts[1] == sum(sizes)
    print(backend, lib.gn_io_is_direct(io[0], file))
    assert lib.gn_io_destroy(io[0]) == 0
"""


def run_with_hostile_libc(directory: Path, backends: tuple[IoBackend, ...], **environment: str) -> list[str]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (directory / "hostile.c").write_text(HOSTILE_LIBC)
    library = directory / "hostile.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, directory / "hostile.c", "-ldl"], check=True)
    numbers = {IoBackend.URING: "1", IoBackend.AIO: "2", IoBackend.THREADS: "3"}
    finished = subprocess.run(
        [sys.executable, "-c", HOSTILE_PROGRAM, _native.__file__, directory, *(numbers[each] for each in backends)],
        env={**os.environ, "LD_PRELOAD": str(library), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stderr == ""
    return finished.stdout.splitlines()


def test_short_and_refused_transfers_are_continued(tmp_path: Path) -> None:
    printed = run_with_hostile_libc(tmp_path, BACKENDS)
    with IoEngine(IoBackend.THREADS) as engine:
        is_direct = engine.open(tmp_path / "f", NEW_DIRECT).is_direct
    assert [line.split()[1] for line in printed] == [str(int(is_direct))] * len(BACKENDS)


def test_direct_io_refused_in_use_is_replaced_by_the_page_cache(tmp_path: Path) -> None:
    backends = tuple(backend for backend in BACKENDS if backend is not IoBackend.URING)  # libc does not see its files
    printed = run_with_hostile_libc(tmp_path, backends, REFUSE_DIRECT="1")
    assert [line.split()[1] for line in printed] == ["0"] * len(backends)


def forbid_uring() -> bool:
    """Make io_uring_setup (number 425 on every architecture) fail with EPERM from now on, in this process."""
    lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forbidden_io_uring_is_reported_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    def choose() -> str:
        if not forbid_uring():
            return "no seccomp"
        assert available_backends() == (IoBackend.AIO, IoBackend.THREADS)
        assert choose_backend("auto") is IoBackend.AIO
        with pytest.raises(ConfigError, match="'io_uring' does not work on this machine: Operation not permitted"):
            choose_backend("io_uring")
        return caplog.text

    logged = in_forked_child(choose)
    if logged == "no seccomp":
        pytest.skip("seccomp filters are not permitted here")
    assert "WARNING" in logged
    assert "io_uring does not work here (Operation not permitted (errno 1), forbidden by a container's" in logged


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_leaves_the_parents_engine_alone(engine: IoEngine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "f", READ_WRITE)

    def use_in_child() -> str:
        with pytest.raises(OffloadIOError, match="open another one after a fork"):
            file.write(torch.empty(10), 0)
        engine.close()
        return "refused"

    assert in_forked_child(use_in_child) == "refused"
    file.write(torch.ones(10), 0).wait()
    assert (tmp_path / "f").stat().st_size == 40


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_native_engine_refuses_a_forked_process(backend: IoBackend) -> None:
    ffi, lib = _native.ffi, _native.lib
    native = ffi.new("gn_io **")
    assert lib.gn_io_create(native, native_number(backend), 4, 2) == 0

    def use_in_child() -> str:
        assert lib.gn_io_wait(native[0], 1, -1, ffi.NULL) == -errno.ESRCH
        assert lib.gn_io_destroy(native[0]) == -errno.ESRCH
        return "refused"

    assert in_forked_child(use_in_child) == "refused"
    assert lib.gn_io_destroy(native[0]) == 0


# ---------------------------------------------------------------------- choice of a backend


def test_threads_are_always_available() -> None:
    assert BACKENDS[-1] is IoBackend.THREADS


def test_named_backend_is_chosen(backend: IoBackend) -> None:
    assert choose_backend(backend.value) is backend


def test_auto_takes_the_best_backend() -> None:
    assert choose_backend("auto") is BACKENDS[0]


def test_unknown_backend_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r'expected "auto", "io_uring", "aio" or "threads", got \'libaio\''):
        choose_backend("libaio")
