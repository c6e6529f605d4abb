"""TensorNVMe's interface, without its ways of losing data."""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from gemini.errors import ConfigError, OffloadIOError, TensorError
from gemini.offload.disk_offloader import DiskOffloader
from gemini.offload.io import available_backends

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture(params=available_backends(), ids=lambda backend: backend.value)
def offloader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DiskOffloader]:
    with DiskOffloader(tmp_path / "nested" / "dir", n_entries=4, backend=request.param.value) as made:
        yield made


def make_tensors(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1000 * i + 1, generator=generator) for i in range(count)]


def held_nbytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]
)
def test_any_dtype_comes_back(offloader: DiskOffloader, dtype: torch.dtype) -> None:
    tensor = torch.arange(999).remainder(2).to(dtype)
    copy = tensor.clone()
    offloader.sync_write(tensor)
    assert held_nbytes(tensor) == 0
    assert tensor.shape == (999,)
    offloader.sync_read(tensor)
    assert torch.equal(tensor, copy)


def test_reading_again_and_writing_again_work(offloader: DiskOffloader) -> None:
    tensor = torch.ones(5000)
    offloader.sync_write(tensor)
    for _ in range(3):
        offloader.sync_read(tensor)
        assert tensor.sum() == 5000
        tensor.zero_()
    tensor.fill_(2)
    offloader.sync_write(tensor)
    offloader.sync_read(tensor)
    assert tensor.sum() == 10000


def test_parameters_come_back(offloader: DiskOffloader) -> None:
    layer = torch.nn.Linear(30, 20)
    copies = [parameter.detach().clone() for parameter in layer.parameters()]
    offloader.sync_writev(list(layer.parameters()))
    assert [held_nbytes(parameter) for parameter in layer.parameters()] == [0, 0]
    offloader.sync_readv(list(layer.parameters()))
    assert all(torch.equal(p, copy) for p, copy in zip(layer.parameters(), copies, strict=True))
    layer(torch.ones(1, 30)).sum().backward()


def test_asynchronous_calls_run_their_callbacks_once(offloader: DiskOffloader) -> None:
    tensors = make_tensors(20)
    copies = [tensor.clone() for tensor in tensors]
    calls: list[int] = []
    for i, tensor in enumerate(tensors):
        offloader.async_write(tensor, partial(calls.append, i))
    offloader.sync_write_events()
    assert sorted(calls) == list(range(20))
    assert all(held_nbytes(tensor) == 0 for tensor in tensors)
    for i, tensor in enumerate(tensors):
        offloader.async_read(tensor, partial(calls.append, 100 + i))
    offloader.sync_read_events()
    assert sorted(calls[20:]) == list(range(100, 120))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_lists_and_single_tensors_mix(offloader: DiskOffloader) -> None:
    tensors = make_tensors(5)
    copies = [tensor.clone() for tensor in tensors]
    calls: list[str] = []
    offloader.async_writev(tensors, lambda: calls.append("written"))
    offloader.synchronize()
    offloader.sync_read(tensors[3])
    offloader.async_readv([tensors[4], tensors[0]], lambda: calls.append("read"))
    offloader.sync_readv(tensors[1:3])
    offloader.synchronize()
    assert calls == ["written", "read"]
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_operations_on_one_tensor_keep_their_order(offloader: DiskOffloader) -> None:
    tensor = torch.arange(300_000)
    for _ in range(5):
        offloader.async_write(tensor)
        offloader.async_read(tensor)
    offloader.synchronize()
    assert torch.equal(tensor, torch.arange(300_000))


def test_list_longer_than_an_io_vector(offloader: DiskOffloader) -> None:
    tensors = [torch.tensor([i]) for i in range(1500)]
    offloader.sync_writev(tensors)
    offloader.sync_readv(tensors)
    assert [int(tensor) for tensor in tensors] == list(range(1500))


def test_empty_tensor_and_empty_list_are_fine(offloader: DiskOffloader) -> None:
    tensor = torch.empty(0, 3)
    offloader.sync_write(tensor)
    offloader.sync_read(tensor)
    offloader.sync_writev([])
    offloader.sync_readv([])
    assert tensor.shape == (0, 3)


def test_tensor_that_covers_its_storage_may_have_aliases(offloader: DiskOffloader) -> None:
    tensor = torch.arange(12)
    matrix = tensor.view(3, 4)
    offloader.sync_write(matrix)
    assert held_nbytes(tensor) == 0
    offloader.sync_read(matrix)
    assert torch.equal(tensor, torch.arange(12))


# ---------------------------------------------------------------------- records


def test_collected_tensor_gives_its_place_back(offloader: DiskOffloader) -> None:
    for _ in range(10):
        tensors = make_tensors(5)
        offloader.sync_writev(tensors)
        del tensors
    survivor = torch.ones(1)
    offloader.sync_write(survivor)
    assert offloader.held_nbytes == 4096
    assert len(offloader._records) == 1


def test_rewriting_frees_the_former_place(offloader: DiskOffloader) -> None:
    tensor = torch.ones(1024)
    for _ in range(5):
        offloader.sync_write(tensor)
        offloader.sync_read(tensor)
    assert offloader.held_nbytes == 4096


def test_reused_identity_is_not_mistaken(offloader: DiskOffloader) -> None:
    for _ in range(50):
        tensor = torch.ones(10)
        with pytest.raises(TensorError, match="never written"):
            offloader.sync_read(tensor)
        offloader.sync_write(tensor)
        del tensor


def test_file_grows_and_goes_with_close(tmp_path: Path) -> None:
    with DiskOffloader(tmp_path) as offloader:
        tensor = torch.ones(70 << 18)  # more than the file grows by at once
        offloader.sync_write(tensor)
        (name,) = os.listdir(tmp_path)
        assert name.startswith("offload-")
        assert (tmp_path / name).stat().st_size == 70 << 20
    assert os.listdir(tmp_path) == []
    with pytest.raises(OffloadIOError, match="closed DiskOffloader"):
        offloader.sync_read(tensor)
    offloader.close()


def test_forgotten_offloader_removes_its_file(tmp_path: Path) -> None:
    DiskOffloader(tmp_path)
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_closing_finishes_what_is_under_way(tmp_path: Path) -> None:
    calls: list[int] = []
    offloader = DiskOffloader(tmp_path)
    for i, tensor in enumerate(make_tensors(10)):
        offloader.async_write(tensor, partial(calls.append, i))
    offloader.close()
    assert sorted(calls) == list(range(10))


# ---------------------------------------------------------------------- refusals


def refused_tensors() -> dict[str, torch.Tensor]:
    return {
        "expected a contiguous tensor": torch.ones(4, 5).t(),
        "got a view": torch.ones(10)[2:5],
        "covers its storage": torch.ones(10)[:5],
        "dense CPU tensor": torch.ones(3, device="meta"),
        "torch.sparse_coo": torch.ones(3).to_sparse(),
        "borrowed memory": torch.frombuffer(bytearray(16), dtype=torch.uint8),
    }


@pytest.mark.parametrize("message", list(refused_tensors()))
def test_unsuitable_tensor_is_refused_before_anything_happens(offloader: DiskOffloader, message: str) -> None:
    good, bad = torch.ones(3), refused_tensors()[message]
    for call in (offloader.sync_writev, offloader.async_writev, offloader.sync_readv, offloader.async_readv):
        with pytest.raises(TensorError, match=message):
            call([good, bad])
    assert held_nbytes(good) == 12
    assert offloader.written_nbytes == 0


def test_writing_what_is_not_in_memory_is_refused(offloader: DiskOffloader) -> None:
    tensor = torch.ones(3)
    offloader.sync_write(tensor)
    with pytest.raises(TensorError, match="its memory is freed; read it back first"):
        offloader.sync_write(tensor)
    offloader.sync_read(tensor)
    assert tensor.sum() == 3


def test_same_storage_twice_in_a_list_is_refused(offloader: DiskOffloader) -> None:
    tensor = torch.ones(3)
    with pytest.raises(TensorError, match="different storages"):
        offloader.sync_writev([tensor, tensor.view(3, 1)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("uring", "io_uring"), ("io_uring", "io_uring"), ("aio", "aio"), ("pthread", "threads"), ("threads", "threads")],
)
def test_backend_names_of_both_worlds(tmp_path: Path, name: str, expected: str) -> None:
    if expected not in {backend.value for backend in available_backends()}:
        pytest.skip(f"{expected} does not work here")
    with DiskOffloader(tmp_path, backend=name) as offloader:
        assert offloader.backend.value == expected


def test_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of uring, io_uring"):
        DiskOffloader(tmp_path, backend="libaio")


def test_unusable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OffloadIOError, match=r"cannot make directory .*/file"):
        DiskOffloader(tmp_path / "file")


# ---------------------------------------------------------------------- failures


def in_forked_child(function: Callable[[], None]) -> str:
    """Return "" or the traceback of a function run in a child process, which must not use torch's own threads."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            os.write(write_end, traceback.format_exc().encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return text


@forks
@pytest.mark.parametrize("backend", [backend.value for backend in available_backends()])
def test_failed_write_leaves_tensors_and_earlier_record_intact(tmp_path: Path, backend: str) -> None:
    tensors = [torch.ones(100), torch.full((1 << 18,), 2.0)]

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with DiskOffloader(tmp_path, backend=backend) as offloader:
            offloader.sync_writev(tensors)
            offloader.sync_readv(tensors)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
            with pytest.raises(OffloadIOError) as caught:
                offloader.sync_writev(tensors)
            assert caught.value.errno == errno.EFBIG
            offloader.async_write(tensors[1])
            with pytest.raises(OffloadIOError, match="File too large"):
                offloader.synchronize()
            offloader.synchronize()
            assert [held_nbytes(tensor) for tensor in tensors] == [400, 1 << 20]
            assert bytes(tensors[1].untyped_storage()[:4]) == bytes([0, 0, 0, 0x40])
            tensors[1].untyped_storage()[0] = 1
            offloader.sync_read(tensors[1])
            assert tensors[1].untyped_storage()[0] == 0

    assert in_forked_child(work) == ""


def test_failed_read_is_raised_and_leaves_the_tensor_on_disk(offloader: DiskOffloader, tmp_path: Path) -> None:
    tensor = torch.ones(5000)
    offloader.sync_write(tensor)
    (file,) = (tmp_path / "nested" / "dir").iterdir()
    content = file.read_bytes()
    os.truncate(file, 100)
    with pytest.raises(OffloadIOError, match="100 done: No data available"):
        offloader.sync_read(tensor)
    offloader.async_read(tensor)
    with pytest.raises(OffloadIOError, match="No data available"):
        offloader.sync_read_events()
    assert held_nbytes(tensor) == 0
    file.write_bytes(content)
    offloader.sync_read(tensor)
    assert tensor.sum() == 5000


def test_failure_nobody_asked_for_is_logged_at_close(
    offloader: DiskOffloader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensor = torch.ones(5000)
    offloader.sync_write(tensor)
    (file,) = (tmp_path / "nested" / "dir").iterdir()
    os.truncate(file, 0)
    calls: list[int] = []
    offloader.async_read(tensor, lambda: calls.append(1))
    with caplog.at_level(logging.ERROR):
        offloader.close()
    assert "closed with an unreported failed read" in caplog.text
    assert calls == []
