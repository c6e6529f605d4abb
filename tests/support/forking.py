"""Processes that begin with everything imported, to be killed in great numbers."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext

import pytest


def fork_context(monkeypatch: pytest.MonkeyPatch) -> ForkServerContext:
    """Return how to start processes from one that has imported the library, the same for all tests of a run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for that process, which lives on
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gemini.ddp", "gemini.optimizer", "transformers.models.llama.modeling_llama"])
    return context
