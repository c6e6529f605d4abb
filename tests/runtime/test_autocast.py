"""torch.autocast keeps copies of float32 weights; that is said once."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP


@pytest.mark.parametrize(
    ("dtype", "is_enabled", "num_warnings"),
    [(torch.float32, True, 1), (torch.float32, False, 0), (torch.bfloat16, True, 0)],
)
def test_autocast_with_float32_weights_is_warned_of_once(
    dtype: torch.dtype, is_enabled: bool, num_warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = GeminiConfig(device="cpu", dtype=dtype, host_budget="64MiB")
    with GeminiDDP(nn.Linear(8, 8), config) as engine, caplog.at_level(logging.WARNING):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            engine(torch.ones(2, 8))
        assert caplog.records == []
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
                engine(torch.ones(2, 8)).sum().backward()
    assert len(caplog.records) == num_warnings
    assert all("keeps a copy of every weight in bfloat16" in record.getMessage() for record in caplog.records)
