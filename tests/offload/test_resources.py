"""What an engine owns outside its chunks ends in order, and all of it, whatever fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemini.config import GeminiConfig, NVMeConfig
from gemini.errors import WorkerError
from gemini.offload.resources import Resources, budgets_of, open_resources
from gemini.tiers import MemoryTier


def test_a_device_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    class Granter:
        def close(self, *, keep: bool = False) -> None:
            ended.append(keep)

    config = GeminiConfig(
        device="simulated", device_budget="1MiB", host_budget="8MiB", nvme=NVMeConfig(path=tmp_path, budget="1MiB")
    )
    resources = open_resources(config, budgets_of(config), disk_nbytes=1 << 19, granted_by=Granter())
    resources.arena.allocate(4096, "slots")
    monkeypatch.setattr(type(resources.transfers), "synchronize", fail)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        resources.close(keep=True)
    assert ended == [True]
    assert resources.ledger.held_nbytes(MemoryTier.HOST) == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WorkerError, match="closed"):
        resources.pool.submit_copy(torch.empty(4096), torch.empty(4096))


def fail(self: object) -> None:
    raise RuntimeError("CUDA error: unspecified launch failure")


def test_closing_twice_is_allowed(tmp_path: Path) -> None:
    config = GeminiConfig(device="cpu", host_budget="8MiB", nvme=NVMeConfig(path=tmp_path, budget="1MiB"))
    resources: Resources = open_resources(config, budgets_of(config), disk_nbytes=1 << 19)
    resources.close()
    resources.close()
