"""torch.distributed.checkpoint, and its functions for state dicts, treat an engine as the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from training_harness import config_for, distance, hybrid_adam, plain_adamw, same_bits

from gemini import GeminiDDP

# dcp warns that there is no process group, and that a storage class of torch's will go.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

OPTIONS = [
    {},
    {"full_state_dict": True},
    {"full_state_dict": True, "cpu_offload": True},
    {"flatten_optimizer_state_dict": True},
    {"ignore_frozen_params": True},
]


class Tied(nn.Module):
    """A tied weight, a frozen layer, a buffer and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.norm(self.last(self.frozen(self.first(x)).tanh()))

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def build() -> Tied:
    torch.manual_seed(0)
    return Tied()


def train(model: Any, optimizer: torch.optim.Optimizer, num_steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        x, y = (torch.randn(4, 8, generator=generator) for _ in range(2))
        (model(x) - y).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def values_of(state: Any, place: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of nested dictionaries and lists, and the names that groups have their parameters under."""
    if isinstance(state, torch.Tensor):
        return {place: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    found: dict[str, torch.Tensor] = {}
    for key, value in items:
        found |= values_of(value, f"{place}/{key}")
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda fields: "-".join(fields) or "none")
@pytest.mark.parametrize("of", [lambda engine: engine, lambda engine: engine.module], ids=["engine", "model"])
def test_state_dicts_are_the_plain_models(of: Any, options: dict[str, bool], place: str, tmp_path: Path) -> None:
    plain = build()
    adamw = plain_adamw(trainable(plain))
    train(plain, adamw, 2, seed=1)
    chosen = StateDictOptions(**options)
    expected, expected_state = get_state_dict(plain, adamw, options=chosen)
    with GeminiDDP(build(), config_for(place, tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        train(engine, optimizer, 2, seed=1)
        found, state = get_state_dict(of(engine), optimizer, options=chosen)
    assert found.pop("_extra_state") == expected.pop("_extra_state") == {"calls": 2}
    assert distance(found, expected) < 1e-6
    assert distance(values_of(state), values_of(expected_state)) < 1e-5
    if "flatten_optimizer_state_dict" not in options:
        groups = [group["params"] for group in expected_state["param_groups"]]
        assert [group["params"] for group in state["param_groups"]] == groups


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda fields: "-".join(fields) or "none")
def test_a_run_goes_on_from_what_dcp_saved(options: dict[str, bool], place: str, tmp_path: Path) -> None:
    """As torch's recipes do it: what a new engine and optimizer have is the template that is loaded into."""
    plain = build()
    adamw = plain_adamw(trainable(plain))
    train(plain, adamw, 2, seed=1)
    train(plain, adamw, 2, seed=2)
    chosen = StateDictOptions(**options)
    (tmp_path / "swap").mkdir()
    config = config_for(place, tmp_path / "swap")
    with GeminiDDP(build(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        train(engine, optimizer, 2, seed=1)
        model, state = get_state_dict(engine, optimizer, options=chosen)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path / "saved")
    with GeminiDDP(build(), config) as engine:
        optimizer = hybrid_adam(engine.parameters(), lr=0.5)
        model, state = get_state_dict(engine, optimizer, options=chosen)
        loaded = {"model": model, "optimizer": state}
        dcp.load(loaded, checkpoint_id=tmp_path / "saved")
        set_state_dict(
            engine,
            optimizer,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
            options=chosen,
        )
        assert engine.module.calls == 2
        train(engine, optimizer, 2, seed=2)
        assert distance(engine.master_state_dict(), without_extra(plain)) < 1e-6
        assert all(param.grad is None for param in engine.parameters())


def without_extra(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def test_what_a_plain_model_saved_loads_and_back(tmp_path: Path) -> None:
    plain = build()
    adamw = plain_adamw(trainable(plain))
    train(plain, adamw, 2, seed=1)
    model, state = get_state_dict(plain, adamw)
    with GeminiDDP(build(), config_for("nvme", tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        set_model_state_dict(engine, model)
        assert same_bits(engine.master_state_dict(), without_extra(plain))
        twin = build()
        set_model_state_dict(twin, get_model_state_dict(engine))
        assert same_bits(without_extra(twin), without_extra(plain))
        assert get_optimizer_state_dict(engine, optimizer)["state"].keys() == state["state"].keys()


def test_plain_dcp_of_an_engines_state_dict(tmp_path: Path) -> None:
    with GeminiDDP(build(), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        train(engine, optimizer, 1, seed=1)
        expected = engine.state_dict()
        dcp.save(expected, checkpoint_id=tmp_path)
    loaded: dict[str, Any] = {**build().state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert loaded.pop("_extra_state") == expected.pop("_extra_state")
    assert same_bits(loaded, expected)


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
def test_the_wrapped_model_itself_can_be_set(place: str, tmp_path: Path) -> None:
    given = {name: value + 1 if torch.is_tensor(value) else value for name, value in build().state_dict().items()}
    with GeminiDDP(build(), config_for(place, tmp_path)) as engine:
        set_model_state_dict(engine.module, given)
        found = engine.master_state_dict()
    assert all(torch.equal(found[name], value) for name, value in given.items() if torch.is_tensor(value))


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
def test_gradients_set_by_hand_count(place: str, tmp_path: Path) -> None:
    plain = build()
    adamw = plain_adamw(trainable(plain))
    with GeminiDDP(build(), config_for(place, tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for params, each in ((trainable(plain), adamw), (trainable(engine), optimizer)):
            generator = torch.Generator().manual_seed(1)
            for _ in range(2):
                for param in params:
                    param.grad = torch.randn(param.shape, generator=generator)
                each.step()
                each.zero_grad()
        assert distance(engine.master_state_dict(), without_extra(plain)) < 1e-6
