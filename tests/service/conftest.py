"""Services for tests: one for a whole module whose tests leave nothing in it, and one for a single test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from service_process import ServiceProcess, running_service


@pytest.fixture
def service() -> Iterator[ServiceProcess]:
    with running_service() as started:
        yield started
