"""What holds for tests of weights in Hugging Face's layout: helpers can be imported, ranks are shared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importmode=importlib leaves sys.path alone
sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
sys.path.insert(0, str(Path(__file__).parent.parent / "zero"))

from rank_pool import RankPool


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Processes that act as ranks, started when first asked for."""
    with RankPool() as pool:
        yield pool
