"""The time of a step in the report: measured, and predicted beside it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fake_clock import FakeClock
from torch import nn

from gemini import ConfigError, GeminiConfig, GeminiDDP, HardwareProfile, HybridAdam, StepFlops
from gemini.runtime import step_clock

PROFILE = HardwareProfile(matrix_rates={"float32": 1e4}, host_memory_rate=1e6)
FLOPS = StepFlops(forward=1e4, backward=2e4)
FORWARD_S = 0.05
LOADING_S = 0.3


class SlowLinear(nn.Linear):
    def __init__(self, clock: FakeClock) -> None:
        super().__init__(32, 32)
        self.clock = clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.sleep(FORWARD_S)
        return super().forward(x)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    clock.set_in(monkeypatch, step_clock)
    return clock


def trained(num_steps: int, clock: FakeClock) -> GeminiDDP:
    config = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="16MiB", gradient_accumulation=False)
    engine = GeminiDDP(SlowLinear(clock), config)
    optimizer = HybridAdam(engine.parameters())
    for _ in range(num_steps):
        clock.sleep(LOADING_S)
        engine(torch.ones(2, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine


def test_step_is_timed_from_forward_to_update_without_what_comes_between_steps(clock):
    with trained(num_steps=3, clock=clock) as engine:
        step_s = engine.memory_report().step_s
    assert step_s == pytest.approx(FORWARD_S)


def test_the_first_step_is_not_timed(clock):
    with trained(num_steps=1, clock=clock) as engine:
        assert engine.memory_report().step_s is None


def test_prediction_stands_beside_the_measurement(clock):
    with trained(num_steps=2, clock=clock) as engine:
        report = engine.memory_report(profile=PROFILE, flops=FLOPS)
    # 32 x 32 + 32 elements, padded to 1088: the gradient is stored (8 bytes each); the update reads and writes a state
    # record of two parts of 8,192 bytes and the weights, and reads the gradient (12 bytes each).
    store_s, update_s = 8 * 1088 / 1e6, (2 * 2 * 8192 + 12 * 1088) / 1e6
    assert report.predicted is not None
    assert report.predicted.step_s == pytest.approx(3.0 + store_s + update_s)
    assert report.predicted.bottleneck == "compute"
    assert "predicted, overlap off, bottleneck compute (compute 3.000 s, host memory 0.055 s)" in str(report)
    read = json.loads(report.to_json())
    assert read["predicted"]["seconds"]["compute"] == pytest.approx(3.0)
    assert read["step_s"] == report.step_s


def test_without_a_profile_nothing_is_predicted(clock):
    with trained(num_steps=0, clock=clock) as engine:
        assert engine.memory_report().predicted is None


@pytest.mark.parametrize("given", [{"profile": PROFILE}, {"flops": FLOPS}])
def test_half_of_what_a_prediction_needs_is_refused(given, clock):
    with trained(num_steps=0, clock=clock) as engine, pytest.raises(ConfigError, match="give both or neither"):
        engine.memory_report(**given)


def test_a_profile_that_lacks_the_working_dtype_is_refused(clock):
    profile = dataclasses.replace(PROFILE, matrix_rates={})
    with (
        trained(num_steps=0, clock=clock) as engine,
        pytest.raises(ConfigError, match="no rate for matrix products in float32"),
    ):
        engine.memory_report(profile=profile, flops=FLOPS)
