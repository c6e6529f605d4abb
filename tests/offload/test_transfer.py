"""Copies between host and compute memory, on the CPU and on the simulated device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_resources import random_bytes, small_resources

from gemini.errors import OutOfTierMemoryError, WorkerError
from gemini.offload.accelerator import Accelerator
from gemini.offload.transfer import StreamTransfers
from gemini.tiers import MemoryTier, TierLedger

DEVICE, HOST = MemoryTier.DEVICE, MemoryTier.HOST


def test_the_simulated_device_has_a_budget_of_its_own() -> None:
    with small_resources(device="simulated", device_budget="12KiB", host_budget="4KiB") as resources:
        buffer = resources.transfers.allocate(8191, "slots")
        assert buffer.numel() == 8192
        assert buffer.data_ptr() % 4096 == 0
        assert resources.ledger.by_purpose(DEVICE) == {"slots": 8192}
        with pytest.raises(OutOfTierMemoryError, match=r"^device tier: 8.00 KiB more for slots .* raise device_budget"):
            resources.transfers.allocate(8192, "slots")
        resources.transfers.free(buffer, "slots")
        assert resources.ledger.held_nbytes(DEVICE) == resources.ledger.held_nbytes(HOST) == 0


@pytest.mark.parametrize("nbytes", [1, 4095, 1 << 20])
def test_bytes_survive_the_way_up_and_down(nbytes: int) -> None:
    with small_resources(device="simulated") as resources:
        transfers = resources.transfers
        source, back = random_bytes(nbytes), torch.zeros(nbytes, dtype=torch.uint8)
        there = transfers.allocate(nbytes, "slots")[:nbytes]
        transfers.upload(there, source).wait_on_compute()
        move = transfers.download(back, there)
        move.wait_on_host()
        assert move.is_done()
        assert torch.equal(back, source)


def test_many_copies_may_be_under_way() -> None:
    with small_resources(device="simulated") as resources:
        sources = [random_bytes(10_000, seed) for seed in range(50)]
        buffers = [resources.transfers.allocate(10_000, "slots")[:10_000] for _ in sources]
        moves = [resources.transfers.upload(b, s) for b, s in zip(buffers, sources, strict=True)]
        for move in reversed(moves):
            move.wait_on_host()
        assert all(torch.equal(b, s) for b, s in zip(buffers, sources, strict=True))


def test_the_buffers_of_a_copy_live_until_it_has_ended() -> None:
    with small_resources(device="simulated", num_threads=1) as resources:
        kept = torch.zeros(1 << 20, dtype=torch.uint8)
        first = resources.transfers.upload(kept, random_bytes(1 << 20, 1))  # nobody else holds the source
        second = resources.transfers.upload(kept, random_bytes(1 << 20, 2))
        first.wait_on_host()
        second.wait_on_host()
        assert torch.equal(kept, random_bytes(1 << 20, 2))


def test_a_copy_after_the_end_is_refused() -> None:
    with small_resources(device="simulated") as resources:
        buffer = resources.transfers.allocate(4096, "slots")
    with pytest.raises(WorkerError, match="cannot submit copy: the worker pool is closed"):
        resources.transfers.upload(buffer, random_bytes(4096))


def test_traffic_is_counted_by_direction() -> None:
    with small_resources(device="simulated") as resources:
        transfers = resources.transfers
        there, here = transfers.allocate(8192, "slots"), torch.zeros(8192, dtype=torch.uint8)
        for _ in range(3):
            transfers.upload(there[:100], here[:100]).wait_on_host()
        transfers.download(here[:4096], there[:4096]).wait_on_host()
        traffic = transfers.traffic
        assert (traffic.num_uploads, traffic.uploaded_nbytes) == (3, 300)
        assert (traffic.num_downloads, traffic.downloaded_nbytes) == (1, 4096)


def test_what_a_device_refuses_is_credited_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", refuse)
    ledger = TierLedger({DEVICE: 1 << 20})
    transfers = StreamTransfers(Accelerator(torch.device("cuda", 1)), ledger)
    with pytest.raises(OutOfTierMemoryError, match=r"^cuda:1 refused 4.00 KiB for slots, which device_budget allows"):
        transfers.allocate(100, "slots")
    assert ledger.held_nbytes(DEVICE) == 0


def test_on_the_cpu_compute_memory_is_host_memory(tmp_path: Path) -> None:
    with small_resources(tmp_path) as resources:
        assert resources.transfers.compute_tier is HOST
        buffer = resources.transfers.allocate(5000, "slots")
        assert resources.ledger.by_purpose(HOST) == {"slots": 8192}
        resources.transfers.free(buffer, "slots")
        assert resources.ledger.held_nbytes(HOST) == 0
        with pytest.raises(AssertionError, match="no device memory"):
            resources.transfers.upload(buffer, buffer)
