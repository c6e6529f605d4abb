"""torch's ways of checkpointing activations change neither numbers nor names, put on before the engine or after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed._composable import checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from training_harness import PLACEMENTS, config_for, distance, hybrid_adam, plain_adamw, same_bits

from gemini import GeminiDDP


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.drop(self.down(self.up(self.norm(x)).relu()))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), *(Block() for _ in range(3)), nn.Linear(16, 16))


def composable(model: nn.Sequential) -> None:
    for block in model[1:4]:
        checkpoint(block)


def composable_layers(model: nn.Sequential) -> None:
    for block in model[1:4]:
        checkpoint(block.up)
    checkpoint(model[2])


def wrapped(model: nn.Sequential) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))


def wrapped_reentrant(model: nn.Sequential) -> None:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.REENTRANT),
        check_fn=lambda module: isinstance(module, Block),
    )


def wrapped_layers(model: nn.Sequential) -> None:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))


def offloaded(model: nn.Sequential) -> None:
    for place in (1, 3):
        model[place] = offload_wrapper(model[place])


WAYS = [composable, composable_layers, wrapped, wrapped_reentrant, wrapped_layers, offloaded]


def train(call: Any, optimizer: torch.optim.Optimizer, num_steps: int = 3) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    losses = []
    for _ in range(num_steps):
        loss = call(torch.randn(4, 16, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_plain_torchs(
    way: Callable[[nn.Sequential], None], is_first: bool, place: str, tmp_path: Path
) -> None:
    plain = build()
    expected = train(plain, plain_adamw(plain.parameters()))
    model = build()
    if is_first:
        way(model)
    with GeminiDDP(model, config_for(place, tmp_path)) as engine:
        if not is_first:
            way(model)
        found = train(engine, hybrid_adam(engine.parameters()))
        assert found[0] == expected[0]
        assert all(abs(a - b) < 1e-6 * abs(b) for a, b in zip(found, expected, strict=True))
        assert distance(engine.master_state_dict(), plain.state_dict()) < 1e-6


@pytest.mark.parametrize("place", ["host", "nvme"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", [wrapped, wrapped_layers, offloaded])
def test_names_are_those_of_the_model_without_wrappers(
    way: Callable[[nn.Sequential], None], is_first: bool, place: str, tmp_path: Path
) -> None:
    twin = build()
    other = {name: value + 1 for name, value in twin.state_dict().items()}
    (tmp_path / "swap").mkdir()
    model = build()
    if is_first:
        way(model)
    with GeminiDDP(model, config_for(place, tmp_path / "swap")) as engine:
        if not is_first:
            way(model)
        optimizer = hybrid_adam(engine.parameters())
        for state in (engine.state_dict(), engine.master_state_dict(), engine.module.state_dict()):
            assert same_bits(state, twin.state_dict())
        assert [name for name, _ in engine.named_parameters()] == [name for name, _ in twin.named_parameters()]
        assert not any(engine.load_state_dict(other))
        assert same_bits(engine.state_dict(), other)
        engine.save_pretrained(tmp_path / "saved")
        assert same_bits(load_file(tmp_path / "saved" / "model.safetensors"), other)
        train(engine, optimizer, 1)
        expected = engine.master_state_dict()
        engine.save_checkpoint(tmp_path / "run")
    with GeminiDDP(build(), config_for("host")) as engine:
        _optimizer = hybrid_adam(engine.parameters())
        engine.load_checkpoint(tmp_path / "run")
        assert same_bits(engine.master_state_dict(), expected)


def test_a_wrapped_model_loads_what_was_saved_without_wrappers(tmp_path: Path) -> None:
    with GeminiDDP(build(), config_for("host")) as engine:
        engine.save_pretrained(tmp_path)
        expected = engine.state_dict()
    with torch.device("meta"):
        model = build()
    wrapped(model)
    with GeminiDDP(model, config_for("host"), weights=tmp_path) as engine:
        assert engine.loading_report.missing_keys == ()
        assert same_bits(engine.state_dict(), expected)


def test_a_model_on_meta_begins_the_same_with_wrappers() -> None:
    started = []
    for way in (lambda model: None, wrapped):
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(2)))
        if way is wrapped:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
        with GeminiDDP(model, config_for("host")) as engine:
            started.append(engine.state_dict())
    assert same_bits(*started)
