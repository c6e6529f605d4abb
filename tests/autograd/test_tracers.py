"""Tracers, exporters and function transforms over an engine are refused in its own words, wherever weights live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam, StaticPlacement
from gemini.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of tracers on their way out

X = torch.ones(2, 8)


class Model(nn.Module):
    """Two blocks, one of which uses vmap by itself, as attention masks do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.func.vmap(lambda row: row >= 0)(torch.arange(8))
        for block in self.blocks:
            x = block(x) * mask
        return self.head(x)


@pytest.fixture(params=["host", "device"])
def engine(request) -> Iterator[GeminiDDP]:
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": "cpu"}
    if request.param == "device":
        place = {"device": "simulated", "device_budget": "32MiB", "placement": StaticPlacement()}
    config = GeminiConfig(dtype=torch.float32, host_budget="64MiB", min_unit_nbytes=0, num_threads=1, **place)
    with GeminiDDP(Model(), config) as engine:
        yield engine


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(X),
    "grad_and_value": lambda f: torch.func.grad_and_value(lambda x: f(x).sum())(X),
    "vjp": lambda f: torch.func.vjp(f, X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "jacfwd": lambda f: torch.func.jacfwd(f)(X),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(X),
    "vmap": lambda f: torch.func.vmap(f)(X),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(X),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
    "no_grad": lambda f: torch.no_grad()(torch.func.vmap(f))(X),
}


@pytest.mark.parametrize("part", ["engine", "model", "block"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_refused(name: str, part: str, engine: GeminiDDP) -> None:
    called = {"engine": engine, "model": engine.module, "block": engine.module.blocks[0]}[part]
    with pytest.raises(ModelError, match=r"over a GeminiDDP.*torch\.autograd\.grad.*engine\.state_dict\(\)"):
        TRANSFORMS[name](called)
    assert_trains(engine)


def symbolic_trace(module: nn.Module) -> None:
    torch.fx.symbolic_trace(module)


TRACERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "jit.trace": (lambda module: torch.jit.trace(module, (X,)), r"torch\.jit\.trace"),
    "jit.trace_module": (lambda module: torch.jit.trace_module(module, {"forward": (X,)}), r"torch\.jit\.trace"),
    "jit.script": (torch.jit.script, r"torch\.jit\.script"),
    "export": (lambda module: torch.export.export(module, (X,), strict=False), r"torch\.export"),
    "make_fx": (lambda module: torch.fx.experimental.proxy_tensor.make_fx(module)(X), r"torch\.fx"),
    "fake make_fx": (
        lambda module: torch.fx.experimental.proxy_tensor.make_fx(module, tracing_mode="fake")(X),
        r"torch\.fx",
    ),
}


@pytest.mark.parametrize("part", ["engine", "model"])
@pytest.mark.parametrize("name", TRACERS)
def test_tracers_are_refused(name: str, part: str, engine: GeminiDDP) -> None:
    trace, tracer = TRACERS[name]
    with pytest.raises(ModelError, match=rf"{tracer}.* of a GeminiDDP: .*engine\.state_dict\(\)"):
        trace(engine if part == "engine" else engine.module)
    assert_trains(engine)


def test_symbolic_tracing_is_refused(engine: GeminiDDP) -> None:
    with pytest.raises(ModelError, match=r"torch\.fx.*of a GeminiDDP"):
        torch.fx.symbolic_trace(engine)
    assert_trains(engine)


@pytest.mark.parametrize("part", ["engine", "model"])
def test_replaced_parameters_are_refused(part: str, engine: GeminiDDP) -> None:
    called = engine if part == "engine" else engine.module
    params = {name: torch.zeros_like(param) for name, param in called.named_parameters()}
    with pytest.raises(ModelError, match=r"was replaced after GeminiDDP.*torch\.func\.functional_call"):
        torch.func.functional_call(called, params, (X,))
    assert_trains(engine)


def test_once_the_engine_is_closed_a_model_may_be_scripted_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with GeminiDDP(model, GeminiConfig(device="cpu", dtype=torch.float32, host_budget="64MiB", num_threads=1)):
        pass
    torch.jit.script(model)


def test_what_the_message_recommends_works(engine: GeminiDDP) -> None:
    torch.manual_seed(0)
    plain = Model()
    assert torch.allclose(
        torch.autograd.functional.jacobian(engine, X), torch.autograd.functional.jacobian(plain, X), atol=1e-6
    )
    found, expected = (torch.autograd.functional.jvp(each, X, X)[1] for each in (engine, plain))
    assert torch.allclose(found, expected, atol=1e-6)
    copy = Model()
    copy.load_state_dict(engine.state_dict())
    assert torch.allclose(torch.func.jacrev(copy)(X), torch.func.jacrev(plain)(X))


def assert_trains(engine: GeminiDDP) -> None:
    """Check that what was refused has left nothing behind: a step gives what plain torch gives."""
    torch.manual_seed(0)
    plain = Model()
    for model, kind in ((engine, HybridAdam), (plain, torch.optim.AdamW)):
        optimizer = kind(model.parameters(), lr=1e-3)
        model(X).square().sum().backward()
        optimizer.step()
    weights = engine.master_state_dict()
    assert all(torch.allclose(weights[name], weight, atol=1e-6) for name, weight in plain.state_dict().items())
