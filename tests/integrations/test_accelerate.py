"""accelerate's own loop over an engine: accumulation, clipping, schedules, evaluation, saving."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from model_zoo import HF_CASES
from trainer_runs import Texts, is_close
from training_harness import config_for, distance, hybrid_adam, plain_adamw, same_bits

from gemini import ConfigError, GeminiConfig, GeminiDDP
from gemini.integrations.accelerate import GeminiAccelerator


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate keeps its choices for the process; each test makes its own."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """One script, for a plain Accelerator and a plain model as for ours."""

    def __init__(self, accelerator: accelerate.Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> None:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        loader = torch.utils.data.DataLoader(Texts(), batch_size=2)
        self.accelerator = accelerator
        self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.losses: list[float] = []
        self.norms: list[float] = []

    def epoch(self) -> None:
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5).item())
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())


def ours(config: GeminiConfig) -> Loop:
    engine = GeminiDDP(HF_CASES["gpt2"].model(), config)
    accelerator = GeminiAccelerator(cpu=True, gradient_accumulation_steps=2)
    return Loop(accelerator, engine, hybrid_adam(engine.parameters()))


def test_losses_and_norms_are_those_of_a_plain_model(tmp_path: Path) -> None:
    model = HF_CASES["gpt2"].model()
    plain = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    expected = Loop(plain, model, plain_adamw(model.parameters()))
    expected.epoch()
    found = ours(config_for("nvme", tmp_path))
    with found.model as engine:
        found.epoch()
        assert distance(engine.master_state_dict(), model.state_dict()) < 1e-6
        assert engine.memory_report().nvme_read_nbytes > 0
    assert is_close(found.losses, expected.losses)
    assert is_close(found.norms, expected.norms)


def test_a_loaded_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    first = ours(config_for("nvme", tmp_path / "swap"))
    first.epoch()
    first.accelerator.save_state(str(tmp_path / "state"))
    first.epoch()
    expected = first.model.master_state_dict()
    first.model.close()
    second = ours(config_for("mixed", tmp_path / "swap"))
    second.accelerator.load_state(str(tmp_path / "state"))
    second.epoch()
    with second.model as engine:
        assert second.losses == first.losses[len(second.losses) :]
        assert same_bits(engine.master_state_dict(), expected)
    names = [path.name for path in (tmp_path / "state").iterdir()]
    assert not [name for name in names if "optimizer" in name or "model" in name]


def test_unwrapping_gives_the_users_model(tmp_path: Path) -> None:
    loop = ours(config_for("host"))
    with loop.model as engine:
        assert loop.accelerator.unwrap_model(engine) is engine.module
        assert same_bits(dict(loop.accelerator.get_state_dict(engine)), dict(engine.state_dict()))


def test_a_skipped_step_leaves_the_schedule_where_it_is() -> None:
    loop = ours(config_for("host"))
    with loop.model as engine:
        for factor in (1.0, math.inf):
            (engine(**next(iter(loop.loader))).loss * factor).backward()
            loop.optimizer.step()
            loop.scheduler.step()
        assert loop.optimizer.step_was_skipped
        assert loop.scheduler.get_last_lr() == [pytest.approx(0.9e-3)]


def test_another_optimizer_is_refused() -> None:
    with GeminiDDP(HF_CASES["gpt2"].model(), config_for("host")) as engine:
        accelerator = GeminiAccelerator(cpu=True)
        with pytest.raises(ConfigError, match="expected a HybridAdam"):
            accelerator.prepare(engine, plain_adamw(engine.parameters()))


def test_mixed_precision_of_accelerates_is_refused() -> None:
    with GeminiDDP(HF_CASES["gpt2"].model(), config_for("host")) as engine:
        accelerator = GeminiAccelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(ConfigError, match="Accelerator.mixed_precision"):
            accelerator.prepare(engine)


def test_clipping_some_parameters_or_another_norm_is_refused() -> None:
    loop = ours(config_for("host"))
    with loop.model as engine:
        params = list(engine.parameters())
        with pytest.raises(ConfigError, match="all parameters that the engine trains"):
            loop.accelerator.clip_grad_norm_(params[1:], 1.0)
        with pytest.raises(ConfigError, match="norm_type: expected 2"):
            loop.accelerator.clip_grad_norm_(params, 1.0, norm_type=1)
        with pytest.raises(ConfigError, match="by their norm alone"):
            loop.accelerator.clip_grad_value_(params, 1.0)


def test_clipping_an_engine_together_with_anything_else_is_refused() -> None:
    """The norm is an engine's own; a joint one would silently not be."""
    with (
        GeminiDDP(HF_CASES["gpt2"].model(), config_for("host")) as engine,
        GeminiDDP(HF_CASES["gpt2"].model(), config_for("host")) as other,
    ):
        accelerator = GeminiAccelerator(cpu=True)
        accelerator.prepare(engine, other)
        for rest in (other, torch.nn.Linear(2, 2)):
            params = [*engine.parameters(), *rest.parameters()]
            with pytest.raises(ConfigError, match="clip each model separately"):
                accelerator.clip_grad_norm_(params, 1.0)


def test_two_engines_in_one_loss_train_as_two_plain_models() -> None:
    def losses(accelerator: accelerate.Accelerator, models: list[Any], make_optimizer: Any) -> list[float]:
        optimizers = [make_optimizer(model.parameters()) for model in models]
        *models, first, second, loader = accelerator.prepare(
            *models, *optimizers, torch.utils.data.DataLoader(Texts(), batch_size=4)
        )
        found = []
        for batch in loader:
            loss = models[0](**batch).loss * models[1](**batch).loss
            accelerator.backward(loss)
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        return found

    def models() -> list[Any]:
        return [HF_CASES[name].model() for name in ("gpt2", "llama")]

    expected = losses(accelerate.Accelerator(cpu=True), models(), plain_adamw)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    engines = [GeminiDDP(model, config_for("host")) for model in models()]
    found = losses(GeminiAccelerator(cpu=True), engines, hybrid_adam)
    for engine in engines:
        engine.close()
    assert is_close(found, expected)


def test_other_models_are_prepared_as_ever() -> None:
    accelerator = GeminiAccelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    prepared, _ = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(torch.ones(1, 2)).sum())
    assert accelerator.clip_grad_norm_(prepared.parameters(), 1.0).item() == pytest.approx(math.sqrt(6))
