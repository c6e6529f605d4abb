"""What holds for every test: helpers are importable; `gpu` tests are skipped, with a reason, where there is none.

What a shell hands down to its background jobs, which is to ignore Ctrl-C, is not left to decide what tests find.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))  # importmode=importlib leaves sys.path alone


SLOWER = int(os.environ.get("GEMINI_TEST_SLOWER", "1"))
"""How many times as long as usual tests may take: `make stress` makes the machine slow."""


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Tensors of a few kilobytes: threads of torch's would cost more than they do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SLOWER > 1:
        usual_s = float(config.getini("timeout"))
        for item in items:
            marker = item.get_closest_marker("timeout")
            item.add_marker(pytest.mark.timeout(SLOWER * (marker.args[0] if marker else usual_s)), append=False)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
