"""Copies on streams of their own never race with compute, shown on a model of CUDA's order; see fake_cuda."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from model_zoo import HF_CASES
from training_harness import Case, config_for, hybrid_adam, same_bits, train_gemini

from gemini import GeminiConfig, GeminiDDP
from gemini.offload.transfer import StreamTransfers
from gemini.tiers import MemoryTier, TierLedger

MODES = ("off", "next-forward", "speculative")


def compute_on(cuda: FakeCuda, *tensors: torch.Tensor) -> None:
    cuda.access("compute", reads=list(tensors), writes=[])


def test_the_model_finds_a_copy_that_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as cuda:
        buffer = cuda.watch(torch.zeros(64), "a slot", is_on_device=True)
        compute_on(cuda, buffer)
        with cuda.using(cuda.new_stream()):
            buffer.copy_(torch.ones(64))
        compute_on(cuda, buffer)
    assert cuda.races == [
        "copy_ writes a slot on the stream 1 while compute reads it on the compute stream",
        "compute reads a slot on the compute stream while copy_ writes it on the stream 1",
    ]


def test_an_upload_comes_after_what_was_computed_and_before_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as cuda:
        transfers = StreamTransfers(cuda, TierLedger({MemoryTier.DEVICE: 1 << 20}))
        slot = transfers.allocate(4096, "slots")
        source = cuda.watch(torch.ones(4096, dtype=torch.uint8), "its home", is_on_device=False)
        compute_on(cuda, slot)
        move = transfers.upload(slot, source)
        assert not move.is_done()
        move.wait_on_compute()
        compute_on(cuda, slot)
        assert cuda.races == []
        source.zero_()
        assert cuda.races == ["zero_ writes its home on the host while copy_ reads it on the stream 1"]
        move.wait_on_host()
        assert move.is_done()
        source.zero_()
    assert len(cuda.races) == 1
    assert (transfers.traffic.num_uploads, transfers.traffic.uploaded_nbytes) == (1, 4096)


def test_an_upload_after_a_mark_waits_for_no_later_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as cuda:
        transfers = StreamTransfers(cuda, TierLedger({MemoryTier.DEVICE: 1 << 20}))
        slot, other = transfers.allocate(4096, "slots"), transfers.allocate(4096, "others")
        compute_on(cuda, slot)
        mark = transfers.mark()
        compute_on(cuda, other)
        transfers.upload(slot, torch.ones(4096, dtype=torch.uint8), after=mark)
        assert cuda.races == []
        transfers.upload(other, torch.ones(4096, dtype=torch.uint8), after=mark)
    assert len(cuda.races) == 1


def train(case: Case, config: GeminiConfig, *, num_steps: int = 4) -> dict[str, torch.Tensor]:
    """Train with a forward between backward and step whose result nobody waits for."""
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters(), max_grad_norm=0.8)
        torch.manual_seed(2)
        for batch in case.batches(num_steps):
            case.loss(engine(**batch)).backward()
            with torch.no_grad():
                engine(**batch)
            optimizer.step()
        return engine.master_state_dict()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["device", "mixed", "resident"])
def test_no_copy_of_an_engine_races_with_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, mode: str
) -> None:
    case = HF_CASES["gpt2"]
    config = config_for(place, tmp_path, overlap=mode)
    expected = train(case, config)
    with fake_cuda(monkeypatch) as cuda:
        found = train(case, config)
    assert sorted(set(cuda.races)) == []
    assert same_bits(found, expected)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetching_does_not_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    case = HF_CASES["gpt2"]
    with fake_cuda(monkeypatch) as cuda:
        train_gemini(case, config_for("mixed", tmp_path, prefetch_depth=depth, overlap="next-forward"), num_steps=4)
    assert sorted(set(cuda.races)) == []


def test_checkpoints_of_slices_do_not_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = HF_CASES["gpt2"]
    case = dataclasses.replace(gpt2, batch=lambda generator: {**gpt2.batch(generator), "use_cache": False})
    config = config_for("device", tmp_path, num_batch_slices=2, overlap="next-forward")
    expected = train(case, config)
    with fake_cuda(monkeypatch) as cuda:
        found = train(case, config)
    assert sorted(set(cuda.races)) == []
    assert same_bits(found, expected)
