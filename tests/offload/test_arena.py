"""Host memory: exact sizes, page alignment, the budget, and that what is given back is gone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_resources import mapped_nbytes, resident_pages

from gemini.errors import OutOfTierMemoryError
from gemini.kernels.pool import WorkerPool
from gemini.kernels.topology import read_topology
from gemini.offload import accelerator
from gemini.offload.accelerator import Accelerator
from gemini.offload.arena import HostArena
from gemini.tiers import MemoryTier, TierLedger

HOST = MemoryTier.HOST


def make_arena(budget_nbytes: int | None = None) -> tuple[HostArena, TierLedger]:
    ledger = TierLedger({HOST: budget_nbytes})
    return HostArena(ledger), ledger


def huge_pages_are_given() -> bool:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return mode.exists() and "[never]" not in mode.read_text()


def huge_nbytes() -> int:
    """Bytes of this process's private memory that lie in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")) << 10


@pytest.mark.parametrize(("wanted", "given"), [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (3 << 20, 3 << 20)])
def test_a_buffer_takes_whole_pages_and_no_power_of_two(wanted: int, given: int) -> None:
    arena, ledger = make_arena()
    buffer = arena.allocate(wanted, "state")
    assert buffer.dtype is torch.uint8
    assert buffer.numel() == given == ledger.held_nbytes(HOST)
    assert buffer.data_ptr() % 4096 == 0
    assert buffer.untyped_storage().nbytes() == given


def test_a_new_buffer_is_zero_and_writable() -> None:
    arena, _ = make_arena()
    buffer = arena.allocate(10_000, "state")
    assert not buffer.any()
    buffer.fill_(7)
    assert int(buffer.sum(dtype=torch.int64)) == 7 * 12_288


def test_a_huge_page_buffer_is_mapped_and_kept_exact() -> None:
    arena, ledger = make_arena()
    before = mapped_nbytes()
    buffer = arena.allocate((5 << 20) + 1, "state")
    assert mapped_nbytes() - before == buffer.numel() == ledger.held_nbytes(HOST) == (5 << 20) + 4096


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="needs a kernel with memory policies")
@pytest.mark.parametrize(("num_nodes", "policy"), [(1, "default"), (2, "interleave:")])
def test_buffers_are_dealt_out_over_nodes_if_there_are_several(num_nodes: int, policy: str) -> None:
    # The same node twice stands for two, so that any machine can run this.
    arena = HostArena(TierLedger({HOST: None}), nodes=[read_topology().nodes[0][0]] * num_nodes)
    buffer = arena.allocate(1 << 20, "state").fill_(1)
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith(f"{buffer.data_ptr():x} ")]
    assert found.startswith(policy)


def test_one_byte_above_the_budget_is_refused_and_nothing_is_mapped() -> None:
    arena, ledger = make_arena(8192)
    first = arena.allocate(4096, "state")
    before = mapped_nbytes()
    with pytest.raises(OutOfTierMemoryError, match=r"^host tier: 8.00 KiB more for working exceed .* host_budget"):
        arena.allocate(4097, "working")
    assert mapped_nbytes() == before
    assert ledger.held_nbytes(HOST) == first.numel()


def test_what_the_machine_refuses_is_credited_back() -> None:
    arena, ledger = make_arena()
    with pytest.raises(OutOfTierMemoryError, match=r"^the machine refused .* for state: .*; lower host_budget$"):
        arena.allocate(1 << 62, "state")
    assert ledger.held_nbytes(HOST) == 0


def test_memory_goes_with_the_last_view() -> None:
    arena, ledger = make_arena()
    before = mapped_nbytes()
    buffer = arena.allocate(1 << 20, "state")
    view = buffer[:10]
    arena.free(buffer)
    del buffer
    assert ledger.held_nbytes(HOST) == 0
    assert mapped_nbytes() - before == 1 << 20
    view.fill_(1)
    del view
    assert mapped_nbytes() == before


def test_close_gives_everything_back_once() -> None:
    arena, ledger = make_arena()
    before = mapped_nbytes()
    buffers = [arena.allocate(4096, purpose) for purpose in ("state", "working", "state")]
    arena.free(buffers[1])
    arena.close()
    arena.close()
    assert ledger.by_purpose(HOST) == {}
    del buffers
    assert mapped_nbytes() == before


def test_buffers_hold_no_file_descriptors() -> None:
    """There may be thousands of buffers, and a process often may have no more than 1024 files open."""
    arena, _ = make_arena()
    before = len(os.listdir("/proc/self/fd"))
    buffers = [arena.allocate(4096, "state") for _ in range(10)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(buffers) == 10


def test_a_fork_copies_no_buffer() -> None:
    arena, _ = make_arena()
    buffer = arena.allocate(5 << 20, "state").fill_(42)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests
        child = os.fork()
    if child == 0:
        os._exit(int(buffer.any()))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child has a copy"
    assert int(buffer.sum(dtype=torch.int64)) == 42 * buffer.numel()


@pytest.mark.skipif(not huge_pages_are_given(), reason="the kernel gives huge pages to nobody")
def test_large_buffers_lie_in_huge_pages() -> None:
    arena, _ = make_arena()
    before = huge_nbytes()
    buffers = [arena.allocate((5 << 20) + 4096, "state").fill_(1) for _ in range(8)]
    assert huge_nbytes() - before >= 4 * (4 << 20)  # all eight, on a machine with free memory in large pieces
    del buffers


def test_the_peak_is_what_was_held_at_once() -> None:
    arena, ledger = make_arena()
    for _ in range(3):
        arena.free(arena.allocate(8192, "state"))
    assert ledger.peak_nbytes(HOST) == 8192


class FakeDriver:
    """A CUDA runtime that notes what it is asked, and refuses to lock what is larger than it likes."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, largest_nbytes: int = 1 << 40, total_nbytes: int = 1 << 40
    ) -> None:
        self.calls: list[object] = []
        self.largest_nbytes, self.total_nbytes = largest_nbytes, total_nbytes
        self.locked: dict[int, int] = {}
        monkeypatch.setattr(accelerator, "_cuda_runtime", lambda: self)
        monkeypatch.setattr(
            "gemini.offload.accelerator._clear_last_error", lambda: self.calls.append("clear the error")
        )
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.calls.append(f"wait for {device}"))
        monkeypatch.setattr(torch.cuda, "device", self.select)

    @contextmanager
    def select(self, device: torch.device) -> Iterator[None]:
        self.calls.append(f"select {device}")
        yield
        self.calls.append("select what was")

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("lock", nbytes))
        if nbytes > self.largest_nbytes or sum(self.locked.values()) + nbytes > self.total_nbytes:
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        self.calls.append("unlock")
        del self.locked[address]


def test_what_a_device_copies_is_locked_on_that_device_until_its_copies_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver(monkeypatch)
    arena = HostArena(TierLedger({HOST: None}), accelerator=Accelerator(torch.device("cuda", 1)))
    buffer = arena.allocate(5000, "working")
    assert driver.calls == ["select cuda:1", ("lock", 8192), "select what was"]
    driver.calls.clear()
    arena.free(buffer)
    assert driver.calls == ["wait for cuda:1", "unlock"]


def test_pages_exist_before_they_are_locked_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    found: list[int] = []

    def lock(self: Accelerator, buffer: torch.Tensor) -> None:
        found.append(resident_pages(buffer))

    monkeypatch.setattr(Accelerator, "lock", lock)
    with WorkerPool(2) as pool:
        accelerator = Accelerator(torch.device("cuda", 0))
        arena = HostArena(TierLedger({HOST: None}), accelerator=accelerator, pool=pool)
        arena.allocate(64 * 4096, "working")
        assert found == [64]
        assert resident_pages(arena.allocate(64 * 4096, "state")) == 0
    assert driver.calls == []


def test_what_no_device_copies_is_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    arena = HostArena(TierLedger({HOST: None}), accelerator=Accelerator(torch.device("cuda", 0)))
    for purpose in ("state", "gradients"):
        arena.free(arena.allocate(4096, purpose))
    assert driver.calls == []


def test_what_others_pass_through_is_locked_in_place_of_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch, total_nbytes=16_384)
    arena = HostArena(TierLedger({HOST: None}), accelerator=Accelerator(torch.device("cuda", 0)))
    homes = [arena.allocate(8192, purpose) for purpose in ("working", "working", "working", "state")]
    assert [arena.is_pageable(home) for home in homes] == [False, False, True, True]
    slot = arena.allocate(8192, "fetch slots")
    assert not arena.is_pageable(slot)
    assert [arena.is_pageable(home) for home in homes] == [False, True, True, True]
    arena.free(slot)
    assert not arena.is_pageable(arena.allocate(4096, "working"))


def test_sums_of_gradients_go_to_locked_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch)
    accelerator = Accelerator(torch.device("cuda", 0))
    arena = HostArena(TierLedger({HOST: None}), accelerator=accelerator, never_copied=frozenset({"state"}))
    assert not arena.is_pageable(arena.allocate(4096, "gradients"))
    assert arena.is_pageable(arena.allocate(4096, "state"))


def test_a_refusal_to_lock_is_said_once_and_blamed_on_no_later_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = FakeDriver(monkeypatch, largest_nbytes=4096)
    arena = HostArena(TierLedger({HOST: None}), accelerator=Accelerator(torch.device("cuda", 0)))
    buffers = [arena.allocate(8192, "working") for _ in range(2)]
    assert driver.calls.count("clear the error") == 2
    assert [record.message for record in caplog.records] == [
        "page-locking host memory failed (CUDA error 2): memory that is not locked is copied through slots"
    ]
    for buffer in buffers:
        arena.free(buffer)
    assert "unlock" not in driver.calls
