"""Other code's optimizers, clipping and loss scaling over an engine's parameters are refused, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from gemini import GeminiConfig, GeminiDDP, HybridAdam
from gemini.autograd.guards import foreign_write_error
from gemini.errors import ConfigError, ModelError

CONFIG = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="64MiB", num_threads=1)
X = torch.ones(2, 8)


def model_of(*, sparse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) if not sparse else nn.Embedding(8, 8, sparse=True)


@pytest.fixture
def engine() -> Iterator[GeminiDDP]:
    with GeminiDDP(model_of(), CONFIG) as engine:
        yield engine


def lbfgs(params: Iterable[Any]) -> Any:
    optimizer = torch.optim.LBFGS(params)
    return lambda: optimizer.step(lambda: 0.0)


class Own(torch.optim.Optimizer):
    """As a library beside torch writes one."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.add_(param.grad, alpha=-group["lr"])


class OwnAdam(torch.optim.AdamW):
    """As a library derives one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


NAMES = [
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "Adadelta",
    "RMSprop",
    "Rprop",
    "NAdam",
    "RAdam",
    "Adamax",
    "ASGD",
    "Adafactor",
]
OPTIMIZERS: dict[str, Callable[[Iterable[Any]], Callable[[], Any]]] = {
    "LBFGS": lbfgs,
    "Own": lambda params: Own(params).step,
    "OwnAdam": lambda params: OwnAdam(params).step,
    **{name: partial(lambda kind, params: kind(params).step, getattr(torch.optim, name)) for name in NAMES},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_are_refused(name: str, engine: GeminiDDP) -> None:
    step = OPTIMIZERS[name](engine.parameters())
    engine(X).sum().backward()
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"{name}\.step: 4 of its 4 parameters .* use HybridAdam"):
            step()


def test_sparse_adam_is_refused() -> None:
    with GeminiDDP(model_of(sparse=True), CONFIG) as engine:
        optimizer = torch.optim.SparseAdam(engine.parameters())
        engine(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ConfigError, match="SparseAdam"):
            optimizer.step()


def test_an_optimizer_made_before_the_model_was_wrapped_is_refused() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with GeminiDDP(model, CONFIG) as engine:
        engine(X).sum().backward()
        with pytest.raises(ConfigError, match=r"SGD\.step"):
            optimizer.step()


def test_an_optimizer_of_a_meta_models_parameters_is_refused() -> None:
    with torch.device("meta"):
        model = model_of()
    with GeminiDDP(model, CONFIG) as engine:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine(X).sum().backward()
        with pytest.raises(ConfigError, match=r"SGD\.step"):
            optimizer.step()


def test_an_optimizer_of_mixed_parameters_is_refused_before_it_changes_any(engine: GeminiDDP) -> None:
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [other]}, {"params": list(engine.parameters())}], lr=0.1)
    other.grad = torch.ones(3)
    with pytest.raises(ConfigError, match="4 of its 5 parameters"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))


def test_parameters_added_to_an_optimizer_that_has_passed_are_refused(engine: GeminiDDP) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": list(engine.parameters())})
    with pytest.raises(ConfigError):
        optimizer.step()


def test_optimizers_of_other_parameters_step_as_ever(engine: GeminiDDP) -> None:
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([other], lr=0.1)
    for _ in range(3):
        other.grad = torch.ones(3)
        optimizer.step()
    assert torch.allclose(other, torch.full((3,), 0.7))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, within its compiler
def test_a_compiled_step_of_other_parameters_steps_as_ever(engine: GeminiDDP) -> None:
    other = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([other], lr=0.1)
    other.grad = torch.ones(3)
    torch.compile(optimizer.step, backend="eager")()
    assert torch.allclose(other, torch.full((3,), 0.9))


def test_frozen_parameters_of_an_engine_may_be_among_them() -> None:
    """As those of a soft prompt are, trained before a frozen model."""
    model = model_of().requires_grad_(False)
    prompt = nn.Parameter(torch.ones(2, 8))
    with GeminiDDP(model, CONFIG) as engine:
        optimizer = torch.optim.SGD([*engine.parameters(), prompt], lr=0.1)
        engine(prompt).sum().backward()
        optimizer.step()
        assert not torch.equal(prompt, torch.ones(2, 8))


def test_parameters_are_free_again_once_the_engine_is_closed() -> None:
    model = model_of()
    with GeminiDDP(model, CONFIG):
        pass
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_hybrid_adam_and_what_derives_from_it_step(engine: GeminiDDP) -> None:
    class Derived(HybridAdam):
        """Somebody's own."""

    before = engine.master_state_dict()
    optimizer = Derived(engine.parameters())
    engine(X).sum().backward()
    optimizer.step()
    assert any(not torch.equal(weight, before[name]) for name, weight in engine.master_state_dict().items())


# ---------------------------------------------------------------- loss scaling


def train_scaled(scaler: torch.amp.GradScaler, engine: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        scaler.scale(engine(X).square().mean()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_an_enabled_grad_scaler_is_refused(engine: GeminiDDP) -> None:
    optimizer = HybridAdam(engine.parameters())
    before = engine.master_state_dict()
    with pytest.raises(ConfigError, match=r"GradScaler around HybridAdam: leave it out.*enabled=False"):
        train_scaled(torch.amp.GradScaler("cpu"), engine, optimizer)
    assert all(torch.equal(weight, before[name]) for name, weight in engine.master_state_dict().items())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(engine(X).square().mean()).backward()
    with pytest.raises(ConfigError, match="GradScaler around HybridAdam"):
        scaler.step(optimizer)


def test_a_disabled_grad_scaler_changes_nothing(engine: GeminiDDP) -> None:
    train_scaled(torch.amp.GradScaler("cpu", enabled=False), engine, HybridAdam(engine.parameters()))
    model = model_of()
    train_scaled(torch.amp.GradScaler("cpu", enabled=False), model, torch.optim.AdamW(model.parameters()))
    for name, weight in engine.master_state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], rtol=1e-6)


def test_accelerates_optimizer_refuses_its_own_scaler(engine: GeminiDDP) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    try:
        scaler = torch.amp.GradScaler("cpu")
        kind = accelerate.optimizer.AcceleratedOptimizer
        prepared = kind(HybridAdam(engine.parameters()), device_placement=False, scaler=scaler)
        scaler.scale(engine(X).square().mean()).backward()
        with pytest.raises(ConfigError, match="GradScaler around HybridAdam"):
            prepared.step()
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_the_attribute_that_scalers_read_is_harmless_elsewhere(engine: GeminiDDP) -> None:
    assert HybridAdam._step_supports_amp_scaling is False
    optimizer = HybridAdam(engine.parameters())
    assert "HybridAdam" in repr(optimizer)
    assert copy.deepcopy(optimizer.hyper_state_dict())["steps"] == {}


# ---------------------------------------------------------------- gradients that are only shown


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("_foreach_mul_", ModelError, r"max_grad_norm.*engine\.clip_grad_norm_"),
        ("clamp_", ModelError, r"engine\.clip_grad_norm_"),
        ("_amp_foreach_non_finite_check_and_unscale_", ConfigError, "GradScaler around HybridAdam"),
    ],
)
def test_writes_to_shown_gradients_say_what_to_do_instead(function: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        raise foreign_write_error(function, "head.weight")
