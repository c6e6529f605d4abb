"""A training that only skips its steps ends in an error that names the likely cause first."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam
from gemini.autograd.loss_scale import LossScaler
from gemini.errors import ConfigError, GeminiError, SkippedStepsError
from gemini.runtime.skipped_steps import SkippedSteps


def test_good_steps_in_between_start_the_count_anew() -> None:
    skipped = SkippedSteps(None, most_in_a_row=2)
    for _ in range(5):
        skipped.note_skipped()
        skipped.check()
        skipped.note_taken()
    skipped.note_skipped()
    skipped.note_skipped()
    for _ in range(2):  # again and again, until a step is good
        with pytest.raises(SkippedStepsError, match="the last 2 steps were skipped"):
            skipped.check()


def test_skips_that_find_the_loss_scale_do_not_count() -> None:
    scaler = LossScaler(2.0**16)
    skipped = SkippedSteps(scaler, most_in_a_row=1)
    for _ in range(16):
        skipped.note_skipped()
        skipped.check()
    assert scaler.scale == 1.0
    skipped.note_skipped()
    with pytest.raises(SkippedStepsError):
        skipped.check()


def test_the_first_skip_is_a_warning_that_names_the_likely_cause_first(caplog: pytest.LogCaptureFixture) -> None:
    skipped = SkippedSteps(None, most_in_a_row=None)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            skipped.note_skipped()
            skipped.check()
            skipped.note_taken()
    (record,) = caplog.records
    message = record.getMessage()
    assert message.index("learning rate is too high") < message.index("outside the model's forward")


def engine_of(dtype: torch.dtype = torch.float32, **fields: object) -> GeminiDDP:
    torch.manual_seed(0)
    config = GeminiConfig(device="cpu", dtype=dtype, host_budget="64MiB", num_threads=1, **fields)  # type: ignore[arg-type]
    return GeminiDDP(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)


def train(engine: GeminiDDP, optimizer: HybridAdam, factor: float) -> None:
    dtype = engine.runtime.config.dtype
    (engine(torch.ones(2, 8, dtype=dtype)).float().square().mean() * factor).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_loss_that_stays_nan_stops_the_training_with_weights_as_they_were() -> None:
    with engine_of(max_skipped_steps=3) as engine:
        optimizer = HybridAdam(engine.parameters())
        train(engine, optimizer, 1.0)
        before = engine.master_state_dict()
        train(engine, optimizer, math.nan)
        train(engine, optimizer, math.nan)
        with pytest.raises(
            SkippedStepsError, match=r"the last 3 steps.*learning rate.*GeminiConfig\(max_skipped_steps"
        ):
            train(engine, optimizer, math.nan)
        assert all(torch.equal(weight, before[name]) for name, weight in engine.master_state_dict().items())
        train(engine, optimizer, 1.0)
        assert (engine.runtime.steps.num_steps, engine.runtime.steps.num_skipped_steps) == (2, 3)


@pytest.mark.parametrize(("dtype", "num_allowed"), [(torch.float32, 19), (torch.float16, 16 + 19)])
def test_by_default_twenty_steps_beside_the_search_for_a_loss_scale_are_one_too_many(dtype, num_allowed) -> None:
    with engine_of(dtype) as engine:
        optimizer = HybridAdam(engine.parameters())
        for _ in range(num_allowed):
            train(engine, optimizer, math.nan)
        with pytest.raises(SkippedStepsError, match="the last 20 steps"):
            train(engine, optimizer, math.nan)


def test_any_number_may_be_skipped_if_asked_for() -> None:
    with engine_of(max_skipped_steps=None) as engine:
        optimizer = HybridAdam(engine.parameters())
        for _ in range(25):
            train(engine, optimizer, math.nan)
        assert engine.runtime.steps.num_skipped_steps == 25


def test_it_is_caught_as_what_other_libraries_raise() -> None:
    assert issubclass(SkippedStepsError, FloatingPointError)
    assert issubclass(SkippedStepsError, GeminiError)


@pytest.mark.parametrize("value", [0, -1, 1.5, "20", True])
def test_the_number_is_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="max_skipped_steps"):
        GeminiConfig(max_skipped_steps=value)  # type: ignore[arg-type]
