"""One thread at a time: who comes second is refused, and the first goes on undisturbed."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, StaticPlacement
from gemini.autograd.engine_access import EngineAccess
from gemini.errors import ModelError


class Pausing(nn.Module):
    """Runs what it is given in the midst of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.pause: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        self.pause()
        return self.layers[2](self.layers[1](x))


@pytest.fixture
def engine() -> Iterator[GeminiDDP]:
    torch.manual_seed(0)
    config = GeminiConfig(
        device="simulated",
        dtype=torch.float32,
        device_budget="32MiB",
        host_budget="64MiB",
        placement=StaticPlacement(),
        min_unit_nbytes=0,
        num_threads=1,
    )
    with GeminiDDP(Pausing(), config) as engine:
        yield engine


X = torch.ones(2, 8)


def in_thread(action: Callable[[], Any], start: Callable[[Callable[[], None]], Any] | None = None) -> Exception | None:
    """Run something in another thread; return what it raised."""
    errors: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    if start is None:
        threading.Thread(target=run, name="second").start()
    else:
        start(run)
    assert done.wait(60)
    return errors[0] if errors else None


def losses_of(engine: GeminiDDP, optimizer: HybridAdam, num_steps: int = 3) -> list[float]:
    losses = []
    for _ in range(num_steps):
        loss = engine(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_losses() -> list[float]:
    torch.manual_seed(0)
    model = Pausing()
    optimizer = torch.optim.AdamW(model.parameters())
    return losses_of(model, optimizer)  # type: ignore[arg-type]


ACTIONS: dict[str, Callable[[GeminiDDP, HybridAdam], Any]] = {
    "a forward of the engine": lambda engine, _: engine(X),
    "a forward of the model": lambda engine, _: engine.module(X),
    "a unit": lambda engine, _: engine.module.layers[0](X),
    "a step": lambda _, optimizer: optimizer.step(),
    "zero_grad": lambda _, optimizer: optimizer.zero_grad(),
    "clipping": lambda engine, _: engine.clip_grad_norm_(1.0),
    "reading": lambda engine, _: engine.state_dict(),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_another_thread_is_refused_while_a_forward_runs_and_the_first_goes_on(action, engine: GeminiDDP) -> None:
    optimizer = HybridAdam(engine.parameters(), lr=1e-3)
    errors: list[Exception | None] = []
    engine.module.pause = lambda: errors.append(in_thread(lambda: action(engine, optimizer)))
    losses = losses_of(engine, optimizer)
    assert losses == pytest.approx(plain_losses(), rel=1e-6)
    assert len(errors) == 3
    for error in errors:
        assert isinstance(error, ModelError)
        assert "in thread second, while a forward of the same GeminiDDP is under way in thread MainThread" in str(error)


def test_a_backward_in_another_thread_is_refused_while_a_forward_runs(engine: GeminiDDP) -> None:
    loss = engine(X).square().mean()
    errors: list[Exception | None] = []
    engine.module.pause = lambda: errors.append(in_thread(loss.backward))
    engine(X)
    assert isinstance(errors[0], ModelError)
    assert "a backward in thread second" in str(errors[0])


def test_two_backwards_at_once_are_refused(engine: GeminiDDP) -> None:
    first, second = engine(X).square().mean(), engine(X).square().mean()
    errors: list[Exception | None] = []
    weight = engine.module.layers[0].weight
    weight.register_hook(lambda gradient: None if errors else errors.append(in_thread(second.backward)))
    first.backward()
    assert isinstance(errors[0], ModelError)
    assert "a backward in thread second" in str(errors[0])


def test_threads_may_take_turns(engine: GeminiDDP) -> None:
    optimizer = HybridAdam(engine.parameters(), lr=1e-3)
    losses: list[float] = []
    for turn in range(3):
        train = lambda: losses.extend(losses_of(engine, optimizer, 1))  # noqa: E731
        assert in_thread(train) is None if turn % 2 else train() is None
    assert losses == pytest.approx(plain_losses(), rel=1e-6)


def test_a_forward_that_fails_lets_other_threads_in(engine: GeminiDDP) -> None:
    def fail() -> None:
        raise ValueError("the user's")

    engine.module.pause = fail
    with pytest.raises(ValueError, match="the user's"):
        engine(X)
    with pytest.raises(RuntimeError, match="shapes"):
        engine.module.layers[0](torch.ones(2, 3))
    engine.module.pause = lambda: None
    assert in_thread(lambda: engine(X)) is None


def test_an_interrupted_forward_lets_other_threads_in(engine: GeminiDDP) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    engine.module.pause = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine(X)
    engine.module.pause = lambda: None
    assert in_thread(lambda: engine(X)) is None


def test_a_thread_that_ended_within_a_forward_is_in_nobodys_way() -> None:
    access = EngineAccess()
    assert in_thread(lambda: access.claim("a forward")) is None
    access.claim("a forward")
    assert access.is_ours


def test_autograds_own_threads_are_not_others() -> None:
    """They are threads that Python has not started, within a backward; so is this one."""
    access, passed = EngineAccess(), []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            access.claim("a forward")
            access.check_thread("a backward")
            passed.append(access.is_ours)
            return gradient

    access.claim("a forward")
    loss = Watch.apply(torch.ones(1, requires_grad=True)).sum()
    assert in_thread(loss.backward, lambda run: _thread.start_new_thread(run, ())) is None
    assert passed == [True]
    assert in_thread(lambda: access.claim("a forward"), lambda run: _thread.start_new_thread(run, ())) is not None


def test_only_one_of_many_threads_gets_in() -> None:
    access, barrier, refused = EngineAccess(), threading.Barrier(16), []
    held = threading.Event()

    def claim() -> None:
        barrier.wait()
        try:
            access.claim("a forward")
            held.wait(60)
        except ModelError:
            refused.append(1)
            if len(refused) == 15:
                held.set()

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 15
