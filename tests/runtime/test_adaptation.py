"""What is left of the device goes to chunks, and back to batches that need it; the device may refuse."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, MemoryTier, OutOfTierMemoryError
from gemini.offload.transfer import SimulatedTransfers
from gemini.runtime.memory_probe import StorageCounter

WIDTH, NUM_BLOCKS = 256, 8  # 526,336 bytes of weights in a block
DEVICE = MemoryTier.DEVICE


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Blocks; runs out of memory in forward as often as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.register_buffer("seen", torch.zeros(()))
        self.num_failures = 0
        self.counts = False
        self.drops = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counts:
            self.seen += 1
        for block in self.blocks:
            x = block(nn.functional.dropout(x, training=self.drops))
        if self.num_failures:
            self.num_failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. ")
        return x.square().mean()


def make_engine(budget: str, **fields: Any) -> GeminiDDP:
    config = GeminiConfig(
        device="simulated", dtype=torch.float32, device_budget=budget, host_budget="64MiB", min_unit_nbytes=1, **fields
    )
    return GeminiDDP(Model(), config)


def train_step(engine: GeminiDDP, optimizer: HybridAdam, num_rows: int) -> int:
    """Train on a batch; return the most bytes that the device held, chunks included."""
    batch = torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows))
    held_nbytes = 0
    counter = StorageCounter()
    with engine.runtime.probe.trace(), counter:
        loss = engine(batch)
        held_nbytes = engine.runtime.resources.ledger.held_nbytes(DEVICE)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return held_nbytes + counter.peak_nbytes


def num_residents(engine: GeminiDDP) -> int:
    return sum(homes.is_resident for homes in engine.runtime.plan.chunks)


def test_a_longer_batch_after_a_short_one_fits() -> None:
    with make_engine("5MiB") as engine:
        optimizer = HybridAdam(engine.parameters())
        first = num_residents(engine)
        train_step(engine, optimizer, 4)
        many = num_residents(engine)
        assert many > first
        for num_rows in (4, 48, 4, 40, 48):
            assert train_step(engine, optimizer, num_rows) <= 5 << 20
        assert num_residents(engine) < many


def test_batches_of_any_length_train_as_in_memory() -> None:
    lengths = [4, 4, 48, 16, 60, 8]

    def weights(engine: GeminiDDP) -> dict[str, torch.Tensor]:
        optimizer = HybridAdam(engine.parameters(), lr=1e-2)
        for num_rows in lengths:
            train_step(engine, optimizer, num_rows)
        return engine.master_state_dict()

    with make_engine("5MiB") as small, make_engine("1GiB") as large:
        found, expected = weights(small), weights(large)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_reserve_that_was_asked_for_is_kept() -> None:
    with make_engine("6MiB", activation_reserve="3MiB") as engine:
        train_step(engine, HybridAdam(engine.parameters()), 4)
        assert 2 << 20 < engine.runtime.resources.ledger.held_nbytes(DEVICE) <= 3 << 20


def test_a_copy_that_the_device_refuses_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocate, num_given = SimulatedTransfers.allocate, 0

    def allocate_one_copy(self: SimulatedTransfers, nbytes: int, purpose: str) -> torch.Tensor:
        nonlocal num_given
        if purpose == "resident copies" and engine_is_made:
            num_given += 1
            if num_given > 1:
                raise OutOfTierMemoryError("the device refused it")
        return allocate(self, nbytes, purpose)

    engine_is_made = False
    monkeypatch.setattr(SimulatedTransfers, "allocate", allocate_one_copy)
    with make_engine("5MiB") as engine, caplog.at_level(logging.WARNING):
        engine_is_made, before = True, num_residents(engine)
        optimizer = HybridAdam(engine.parameters())
        for _ in range(3):
            train_step(engine, optimizer, 4)
        assert num_given == 2
        assert num_residents(engine) == before + 1
        assert [chunk.is_resident for chunk in engine.runtime.core.chunks] == [
            homes.is_resident for homes in engine.runtime.plan.chunks
        ]
    assert [record.message for record in caplog.records if "refused" in record.message] == [
        "no more chunks are kept on the device, because it has no memory for another one: the device refused it"
    ]


@pytest.mark.parametrize("drops", [False, True])
def test_a_forward_that_is_out_of_memory_runs_once_more_with_the_same_result(drops: bool) -> None:
    losses, residents = [], []
    for num_failures in (0, 1):
        with make_engine("5MiB") as engine:
            engine.module.drops = drops
            optimizer = HybridAdam(engine.parameters())
            train_step(engine, optimizer, 8)
            engine.module.num_failures = num_failures
            torch.manual_seed(3)
            loss = engine(torch.ones(8, WIDTH))
            loss.backward()
            optimizer.step()
            losses.append((loss.detach(), engine.master_state_dict()))
            residents.append(num_residents(engine))
    assert residents[1] < residents[0]
    (expected, weights), (found, weights_found) = losses
    assert torch.equal(found, expected)
    assert all(torch.equal(weights_found[name], weights[name]) for name in weights)


def test_a_forward_that_is_out_of_memory_twice_says_what_helps() -> None:
    with make_engine("5MiB") as engine:
        optimizer = HybridAdam(engine.parameters())
        engine.module.num_failures = 2
        with pytest.raises(
            OutOfTierMemoryError,
            match=r"again after as many chunks as possible .* CUDA out of memory.* smaller batches",
        ):
            engine(torch.ones(8, WIDTH))
        train_step(engine, optimizer, 8)


def test_a_forward_that_has_changed_a_buffer_is_not_repeated() -> None:
    with make_engine("5MiB") as engine:
        engine.module.counts = True
        engine.module.num_failures = 1
        with pytest.raises(OutOfTierMemoryError, match="not repeated because it had changed buffers"):
            engine(torch.ones(8, WIDTH))
        assert engine.module.seen == 1
        engine(torch.ones(8, WIDTH))
        assert engine.module.seen == 2
