"""A signal is remembered until it is asked for; the second one counts at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gemini.checkpoint.signals
from gemini import ConfigError, GeminiConfig, GeminiDDP, StopOnSignals

pytestmark = pytest.mark.processes


@pytest.fixture
def engine() -> Iterator[GeminiDDP]:
    with GeminiDDP(torch.nn.Linear(2, 2), GeminiConfig(device="cpu", host_budget="8MiB")) as engine:
        yield engine


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered(number: signal.Signals, engine: GeminiDDP) -> None:
    with StopOnSignals(engine) as stop:
        assert not stop.should_stop()
        assert stop.received is None

        os.kill(os.getpid(), number)

        assert stop.should_stop()
        assert stop.received is number


def test_a_second_signal_counts_at_once(engine: GeminiDDP, monkeypatch: pytest.MonkeyPatch) -> None:
    with StopOnSignals(engine) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(gemini.checkpoint.signals, "REPEATED_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.should_stop()


def test_a_signal_that_is_told_twice_is_one(engine: GeminiDDP) -> None:
    with StopOnSignals(engine) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop()


def test_a_signal_that_nobody_was_told_of_is_raised_in_the_end(engine: GeminiDDP) -> None:
    def run() -> None:
        with StopOnSignals(engine) as stop:
            assert not stop.should_stop()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run()


def test_errors_go_before_signals_that_nobody_was_told_of(engine: GeminiDDP) -> None:
    def run() -> None:
        with StopOnSignals(engine):
            os.kill(os.getpid(), signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.parametrize("other", [signal.SIGKILL, "SIGUSR1"])
def test_signals_that_cannot_be_handled_leave_no_handler(other: Any, engine: GeminiDDP) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match=f"{other!r} cannot be handled"):
        StopOnSignals(engine, [signal.SIGTERM, other]).__enter__()
    assert signal.getsignal(signal.SIGTERM) is before


def test_entering_twice_is_refused(engine: GeminiDDP) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopOnSignals(engine) as stop, pytest.raises(ConfigError, match="entered already"):
        stop.__enter__()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("is_signalled", [False, True])
def test_handlers_come_back(is_signalled: bool, engine: GeminiDDP) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopOnSignals(engine) as stop:
        if is_signalled:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.should_stop()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_other_signals_may_be_chosen(engine: GeminiDDP) -> None:
    with StopOnSignals(engine, [signal.SIGUSR1]) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received is signal.SIGUSR1


def test_another_thread_than_the_main_one_is_refused(engine: GeminiDDP) -> None:
    found: list[BaseException] = []

    def enter() -> None:
        try:
            with StopOnSignals(engine):
                pass
        except ConfigError as error:
            found.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()

    assert "expected the main thread" in str(found[0])


class TwoRanks:
    """A group of two ranks, to one of which a signal comes while they exchange what has come before."""

    def __init__(self) -> None:
        self.others = 0

    def gather_values(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.stack([values, torch.tensor([self.others])])


def test_a_signal_that_comes_while_ranks_exchange_theirs_waits_for_the_next_time() -> None:
    runtime = SimpleNamespace(sharding=SimpleNamespace(group=TwoRanks(), is_alone=False))
    with StopOnSignals(SimpleNamespace(runtime=runtime)) as stop:
        assert not stop.should_stop()  # as on the other rank
        assert stop.received is None
        assert stop.should_stop()
        assert stop.received is signal.SIGTERM
        assert stop.should_stop()


def test_another_ranks_signal_is_this_ones() -> None:
    group = TwoRanks()
    group.others = int(signal.SIGINT)
    runtime = SimpleNamespace(sharding=SimpleNamespace(group=group, is_alone=False))
    with StopOnSignals(SimpleNamespace(runtime=runtime)) as stop:
        assert stop.should_stop()
        assert stop.received is signal.SIGINT  # and not the one that came to this rank meanwhile


def test_a_signal_that_is_forgotten_is_not_raised(engine: GeminiDDP) -> None:
    with StopOnSignals(engine) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.forget()
