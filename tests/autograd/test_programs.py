"""Random programs see the same over an engine as over plain PyTorch; see random_programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from random_programs import Program, run

NUM_QUICK, NUM_ALL = 60, 500
BATCH = 20


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=() if first < NUM_QUICK else pytest.mark.slow) for first in range(0, NUM_ALL, BATCH)],
)
def test_random_programs_see_what_they_see_without_an_engine(first: int, tmp_path: Path) -> None:
    refused: Counter[str] = Counter()
    for seed in range(first, first + BATCH):
        folder = tmp_path / str(seed)
        folder.mkdir()
        refusal = run(Program.of(seed), folder)
        if refusal is not None:
            refused[refusal] += 1
    assert sum(refused.values()) <= 3, (
        f"an engine may refuse what it cannot honour, but not as often as this: {refused}"
    )
