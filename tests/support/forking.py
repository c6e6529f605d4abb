"""Processes that begin with everything imported: to be killed in great numbers, or to act as ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from unittest import mock

IMPORTED_ONCE = ["torch.distributed", "gemini", "gemini.ddp", "zero", "transformers.models.llama.modeling_llama"]
"""What would take each process some seconds to import by itself."""


def fork_context() -> ForkServerContext:
    """Return how to start processes from one that has imported the library, the same for all tests of a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # that process sees no other `sys.path`
        forkserver.ensure_running()
    return context
