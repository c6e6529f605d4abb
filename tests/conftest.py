"""What holds for every test: helpers are importable; `gpu` tests are skipped, with a reason, where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))  # importmode=importlib leaves sys.path alone


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tensors of a few kilobytes: threads of torch's would cost more than they do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
