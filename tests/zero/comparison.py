"""When ranks count as having trained like one process."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from rank_cases import Fit, train_alone
from training_harness import distance, same_bits

STAGES = pytest.mark.parametrize("stage", [1, 2, 3])
FLOAT32_TOLERANCE = 1e-6
"""Relative L2 distance of weights where sums are taken in another order."""


@cache
def alone(model: str, world_size: int, **fields: Any) -> Fit:
    return train_alone(model=model, world_size=world_size, **fields)


def agreed(fits: list[Fit]) -> Fit:
    """Check that all ranks hold the same; return one's results with the mean of all losses."""
    for fit in fits[1:]:
        assert same_bits(fit.weights, fits[0].weights)
        assert (repr(fit.norms), fit.num_skipped) == (repr(fits[0].norms), fits[0].num_skipped)
    losses = [math.fsum(step) / len(fits) for step in zip(*(fit.losses for fit in fits), strict=True)]
    return Fit(losses, fits[0].norms, fits[0].weights, fits[0].num_skipped)


def assert_trains_alike(found: Fit, expected: Fit, world_size: int) -> None:
    is_exact = world_size & (world_size - 1) == 0
    if is_exact:
        assert same_bits(found.weights, expected.weights)
    assert distance(found.weights, expected.weights) < FLOAT32_TOLERANCE
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-12 if is_exact else 1e-6)
