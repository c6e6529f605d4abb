"""Weights in memory that is not page-locked reach the device through slots that are, with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from async_device.process import on_async_device
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, StaticPlacement
from gemini.offload.transfer import StreamTransfers

KIB = 1 << 10
WIDTH, NUM_BLOCKS = 64, 6


class _Driver:
    """Locks so many bytes at once and no more; knows which."""

    def __init__(self, limit_nbytes: int) -> None:
        self.locked: dict[int, int] = {}
        self._limit_nbytes = limit_nbytes
        self._module: Any = torch.get_device_module("async_sim")
        self._register, self._unregister = self._module.host_register, self._module.host_unregister

    def __enter__(self) -> _Driver:
        self._module.host_register, self._module.host_unregister = self.register, self.unregister
        return self

    def __exit__(self, *_: object) -> None:
        self._module.host_register, self._module.host_unregister = self._register, self._unregister

    def register(self, address: int, nbytes: int) -> int:
        if sum(self.locked.values()) + nbytes > self._limit_nbytes:
            return 2
        self.locked[address] = nbytes
        return int(self._register(address, nbytes))

    def unregister(self, address: int) -> None:
        del self.locked[address]
        self._unregister(address)

    def has(self, tensor: torch.Tensor) -> bool:
        return any(0 <= tensor.data_ptr() - address < nbytes for address, nbytes in self.locked.items())


def train(driver: _Driver, host_budget: str) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """Train some steps; return masters, and for each upload in them whether it was from locked memory."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(NUM_BLOCKS)))
    config = GeminiConfig(
        device="async_sim",
        dtype=torch.float32,
        device_budget="16MiB",
        host_budget=host_budget,
        placement=StaticPlacement(),
        min_unit_nbytes=1,
        num_threads=2,
    )
    uploads: list[bool] = []
    upload = StreamTransfers.upload

    def watched(self: StreamTransfers, dst: torch.Tensor, src: torch.Tensor, **fields: Any) -> Any:
        uploads.append(driver.has(src))
        return upload(self, dst, src, **fields)

    with GeminiDDP(model, config) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-2)
        StreamTransfers.upload = watched  # type: ignore[method-assign]
        try:
            for step in range(4):
                batch = torch.full((4, WIDTH), step / 7).to("async_sim")
                engine(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            weights = engine.master_state_dict()
        finally:
            StreamTransfers.upload = upload  # type: ignore[method-assign]
    return weights, uploads


@pytest.mark.parametrize("limit_kib", [0, 100, 200])
@on_async_device
def test_every_upload_of_weights_is_from_locked_memory_where_any_can_be_locked(limit_kib: int) -> None:
    with _Driver(1 << 30) as driver:
        expected, uploads = train(driver, "16MiB")
        assert driver.locked == {}
        assert uploads
        assert all(uploads)
    with _Driver(limit_kib * KIB) as driver:
        found, uploads = train(driver, "16MiB")
        assert driver.locked == {}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(uploads) is (limit_kib >= 200)


@on_async_device
def test_without_room_for_slots_copies_block_and_are_right() -> None:
    with _Driver(1 << 30) as driver:
        expected, _ = train(driver, "16MiB")
    with _Driver(0) as driver:
        found, uploads = train(driver, "520KiB")
    assert not any(uploads)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
