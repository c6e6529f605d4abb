"""Ranges that torch's profiler sees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from recorded import NUM_LAYERS, WIDTH, config_for, make_model, train_step
from torch.profiler import ProfilerActivity, profile
from torch_says import refusal_of

from gemini import GeminiDDP, HybridAdam, annotate
from gemini.profile.recording import read_recording


def seen(profiler: profile) -> Counter[str]:
    return Counter(event.name for event in profiler.events() if event.name.startswith("gemini::"))


@pytest.mark.filterwarnings("ignore:.*Kineto.*", "ignore:Warning. Profiler clears events")
def test_units_have_a_range_in_forward_and_a_mark_in_backward(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        optimizer = HybridAdam(engine.parameters())
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train_step(engine, optimizer)
        assert seen(profiler) == Counter()
        with engine.record(tmp_path / "run"), profile(activities=[ProfilerActivity.CPU]) as profiler, annotate(engine):
            train_step(engine, optimizer)
    units = range(NUM_LAYERS)
    expected = ["model", *map(str, units)]
    assert seen(profiler) == Counter(
        [*(f"gemini::forward {name}" for name in expected), *(f"gemini::backward {name}" for name in units)]
    )
    assert len(read_recording(tmp_path / "run").steps) == 1


def test_an_interrupted_forward_leaves_no_range_open(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), config_for("disk", tmp_path)) as engine:
        with annotate(engine):
            with pytest.raises(RuntimeError, match=refusal_of(lambda: torch.ones(1, 2) @ torch.ones(3, 4))):
                engine(torch.ones(8, WIDTH + 1))
            engine(torch.ones(8, WIDTH))
        assert engine.runtime.passes.moments.listeners == ()
