"""What modules keep by get_extra_state goes wherever a plain model's goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_harness import config_for, hybrid_adam

from gemini import CheckpointMismatchError, ConfigError, GeminiDDP


class Counting(nn.Linear):
    """Counts its calls, and keeps the last mean."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.calls = 0
        self.history: Any = {"means": [], "last": torch.zeros(())}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.history["means"].append(float(x.detach().mean()))
        self.history["last"] = x.detach().mean()
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, **self.history}

    def set_extra_state(self, state: Any) -> None:
        self.calls, self.history = state["calls"], {"means": list(state["means"]), "last": state["last"]}


class Giving(nn.Linear):
    """Gives what it keeps and takes nothing, which torch allows."""

    kept: Any = 3

    def get_extra_state(self) -> Any:
        return self.kept


def build(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Counting(), *layers, nn.Linear(8, 8))


def train(call: Any, optimizer: torch.optim.Optimizer, num_steps: int = 3) -> None:
    for _ in range(num_steps):
        call(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(bool(found[key] == expected[key]) for key in expected)


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
def test_state_dicts_hold_it_and_plain_copies_take_it(place: str, tmp_path: Path) -> None:
    twin = build()
    train(twin, torch.optim.SGD(twin.parameters(), 0.0))
    with GeminiDDP(build(), config_for(place, tmp_path)) as engine:
        train(engine, hybrid_adam(engine.parameters()))
        saved = engine.state_dict()
        assert saved.keys() == engine.module.state_dict().keys() == twin.state_dict().keys()
        assert same(saved["0._extra_state"], twin[0].get_extra_state())
        copy = build()
        assert not any(copy.load_state_dict(saved))
        assert copy[0].calls == 3
        copy[0].calls = 7
        assert not any(engine.load_state_dict(copy.state_dict()))
        assert engine.module[0].calls == 7


def test_names_are_compared_as_torch_does() -> None:
    with GeminiDDP(build(Giving(8, 8)), config_for("host")) as engine:
        saved = engine.state_dict()
        with pytest.raises(CheckpointMismatchError, match=r"unexpected \['1._extra_state'\]"):
            engine.load_state_dict(saved)
        assert engine.load_state_dict(saved, strict=False).unexpected_keys == ["1._extra_state"]
        without = {name: value for name, value in saved.items() if not name.endswith("_extra_state")}
        with pytest.raises(CheckpointMismatchError, match=r"missing \['0._extra_state'\]"):
            engine.load_state_dict(without)
        assert engine.load_state_dict(without, strict=False).missing_keys == ["0._extra_state"]


def test_a_module_that_is_there_twice_has_it_under_both_names() -> None:
    counting = Counting()
    twin = nn.Sequential(counting, nn.Linear(8, 8), counting)
    shared = Counting()
    with GeminiDDP(nn.Sequential(shared, nn.Linear(8, 8), shared), config_for("host")) as engine:
        assert engine.state_dict().keys() == twin.state_dict().keys()
        one_name = {name: value for name, value in twin.state_dict().items() if not name.startswith("2.")}
        assert not any(engine.load_state_dict(one_name))


@pytest.mark.parametrize("place", ["host", "nvme"])
def test_checkpoints_restore_it(place: str, tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    config = config_for(place, tmp_path / "swap")
    with GeminiDDP(build(), config) as engine:
        train(engine, hybrid_adam(engine.parameters()))
        expected = engine.module[0].get_extra_state()
        engine.save_checkpoint(tmp_path / "a")
    with GeminiDDP(build(), config) as engine:
        hybrid_adam(engine.parameters())
        engine.load_checkpoint(tmp_path / "a")
        assert same(engine.module[0].get_extra_state(), expected)


def test_a_checkpoint_without_it_is_of_another_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with GeminiDDP(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config_for("host")) as engine:
        engine.save_checkpoint(tmp_path)
    with (
        GeminiDDP(build(), config_for("host")) as engine,
        pytest.raises(
            CheckpointMismatchError, match="^0._extra_state: load_checkpoint: .* has no extra state, and the module"
        ),
    ):
        engine.load_checkpoint(tmp_path)


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    with GeminiDDP(build(Giving(8, 8)), config_for("host")) as engine:
        engine.module[1].kept = {"a": [object()]}
        with pytest.raises(ConfigError, match=r"save_checkpoint: modules\['1._extra_state'\]\['a'\]\[0\]: expected"):
            engine.save_checkpoint(tmp_path)
        assert engine.state_dict()["1._extra_state"] is engine.module[1].kept
