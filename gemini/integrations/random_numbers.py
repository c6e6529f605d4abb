"""Loading a checkpoint in the middle of another library's loop, which restores random numbers at its own time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["unchanged_random_numbers"]


@contextmanager
def unchanged_random_numbers() -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch at the end of the context."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
