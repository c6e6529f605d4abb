"""What a process has committed another one goes on from, bit by bit, in every placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from committed_runs import NUM_STEPS, attached, memory_file, scenarios, uninterrupted
from training_harness import Run

SCENARIOS = scenarios()


def assert_same(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.equal(found.weights[name], value), name


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_engine_goes_on_where_another_was_closed(name: str, tmp_path: Path) -> None:
    """Closing drops updates that have not begun; the next engine, which begins with other weights, finishes them."""
    scenario = SCENARIOS[name]
    expected = uninterrupted(scenario, tmp_path)
    with memory_file(scenario, tmp_path) as descriptor:
        for begin, end in ((0, 2), (2, 3), (3, NUM_STEPS)):
            seed = 0 if not begin or scenario.trainable else 7
            with attached(scenario, tmp_path, descriptor, seed=seed) as training:
                assert training.step == begin
                training.train(end)
                if end == NUM_STEPS:
                    assert_same(training.run, expected)
