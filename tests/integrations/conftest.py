"""What holds for integration tests: helpers can be imported, and nobody asks a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "training"))


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports each trainer's construction to its hub, except here."""
    monkeypatch.setenv("CI", "true")
