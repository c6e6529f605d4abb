"""Services for tests: one for a whole module whose tests leave nothing in it, and one for a single test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_process import ServiceProcess, running_service

TESTS = Path(__file__).parent.parent
for directory in (Path(__file__).parent, TESTS / "commits", TESTS / "training"):
    sys.path.insert(0, str(directory))  # importmode=importlib leaves sys.path alone


@pytest.fixture
def service() -> Iterator[ServiceProcess]:
    with running_service() as started:
        yield started
