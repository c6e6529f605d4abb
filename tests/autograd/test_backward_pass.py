"""Passes of backward that fail, where a thread of autograd's lets go of them late."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from patience import PATIENCE_S

from gemini.autograd import backward_pass
from gemini.autograd.backward_pass import BackwardPass


class Engine:
    """Holds what is called at the end of a pass, as autograd does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[Any] = []
        monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", self)

    def queue_callback(self, callback: Any) -> None:
        self.held.append(callback)


def test_a_pass_that_is_let_go_of_late_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    monkeypatch.setattr(backward_pass, "PATIENCE_S", PATIENCE_S)
    a_pass = BackwardPass()
    a_pass.begin(lambda: None)
    assert a_pass.is_running
    threading.Timer(0.02, engine.held.clear).start()
    assert a_pass.ends_as_failed()


def test_a_pass_that_somebody_still_runs_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    monkeypatch.setattr(backward_pass, "PATIENCE_S", 0.01)
    a_pass = BackwardPass()
    a_pass.begin(lambda: None)
    assert not a_pass.ends_as_failed()
    assert engine.held
    a_pass.end()
    assert not a_pass.ends_as_failed()


def test_a_pass_that_its_caller_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("autograd holds nothing of this pass")

    monkeypatch.setattr(backward_pass.time, "sleep", sleep)
    a_pass = BackwardPass()
    a_pass.begin(None)
    assert not a_pass.ends_as_failed()
    assert a_pass.is_running
