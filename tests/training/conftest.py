"""What holds for training tests: helpers can be imported, torch has one thread, small modules can be units."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importmode=importlib leaves sys.path alone


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tensors of a few kilobytes: threads of torch's would cost more than they do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
