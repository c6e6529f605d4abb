"""Gradients that other code writes to `.grad`, and zeros that `zero_grad` leaves there, count as in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import HIDDEN, Block, Tower, square, vector_batch
from torch import nn
from training_harness import PLACEMENTS, Case, config_for, distance, hybrid_adam, plain_adamw

from gemini import GeminiDDP
from gemini.errors import ConfigError, ModelError

TOWER = Case(Tower, vector_batch, square)


class Routed(nn.Module):
    """A block of two, and a parameter that is used now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.shift = nn.Parameter(torch.ones(HIDDEN))
        self.never = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: torch.Tensor, use: int) -> torch.Tensor:
        x = self.blocks[2](self.blocks[use](x))
        return x + self.shift if use else x


ROUTED = Case(Routed, vector_batch, square)


@pytest.fixture(params=PLACEMENTS)
def config(request, tmp_path):
    return config_for(request.param, tmp_path)


def assert_trains_alike(
    case: Case, config: Any, loop: Callable[[nn.Module, torch.optim.Optimizer], list[float]]
) -> None:
    model = case.model()
    expected = loop(model, plain_adamw(model.parameters()))
    with GeminiDDP(case.model(), config) as engine:
        found = loop(engine, hybrid_adam(engine.parameters()))
        assert distance(engine.master_state_dict(), dict(model.state_dict())) < 1e-6
        assert all(param.grad is None for param in engine.parameters())
    assert found == pytest.approx(expected, rel=1e-6)


def losses_of(model: nn.Module, batches: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [square(model(**batch)) for batch in batches]


# ---------------------------------------------------------------- gradients that other code writes


def by_assignment(loss: torch.Tensor, params: list[nn.Parameter]) -> None:
    for param, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
        param.grad = gradient


def by_addition(loss: torch.Tensor, params: list[nn.Parameter]) -> None:
    for param, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
        param.grad = gradient if param.grad is None else param.grad + gradient


def by_halves(loss: torch.Tensor, params: list[nn.Parameter]) -> None:
    """Half from the accumulation, half by hand, as zero-bubble pipelines do it."""
    half = len(params) // 2
    torch.autograd.backward(loss, inputs=params[:half], retain_graph=True)
    by_addition(loss, params[half:])


def accumulated_first(loss: torch.Tensor, params: list[nn.Parameter]) -> None:
    loss.backward(retain_graph=True)
    gradients = torch.autograd.grad(loss, params)
    for param, gradient in zip(params, gradients, strict=True):
        waiting = param.grad
        param.grad = gradient if waiting is None else waiting + gradient


@pytest.mark.parametrize("deliver", [by_assignment, by_addition, by_halves, accumulated_first])
def test_gradients_that_are_written_to_grad_are_trained_with(deliver, config) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for batch in TOWER.batches(3):
            loss = square(model(**batch))
            deliver(loss, [param for param in model.parameters() if param.requires_grad])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert_trains_alike(TOWER, config, loop)


def test_gradients_of_several_forwards_add_up_whoever_delivers_them(config) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        params = list(model.parameters())
        for first, second, third in (TOWER.batches(3), TOWER.batches(3, seed=5)):
            square(model(**first)).backward()
            by_addition(square(model(**second)), params)
            loss = square(model(**third))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item()]

    assert_trains_alike(TOWER, config, loop)


def test_clipping_and_norms_count_what_is_in_grad(tmp_path) -> None:
    model = TOWER.model()
    by_assignment(square(model(**TOWER.batches(1)[0])), list(model.parameters()))
    expected = float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    with GeminiDDP(TOWER.model(), config_for("nvme", tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters(), max_grad_norm=1e9)
        by_assignment(square(engine(**TOWER.batches(1)[0])), list(engine.parameters()))
        assert float(engine.clip_grad_norm_(1e9)) == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        assert optimizer.last_grad_norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("whose", ["engine", "module", "optimizer"])
def test_zero_grad_drops_what_is_in_grad(whose, tmp_path) -> None:
    with GeminiDDP(TOWER.model(), config_for("host", tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        before = engine.master_state_dict()
        by_assignment(square(engine(**TOWER.batches(1)[0])), list(engine.parameters()))
        {"engine": engine, "module": engine.module, "optimizer": optimizer}[whose].zero_grad()
        optimizer.step()
        assert distance(engine.master_state_dict(), before) == 0
        assert not optimizer.state


def test_a_gradient_written_after_clipping_is_refused(tmp_path) -> None:
    with GeminiDDP(TOWER.model(), config_for("host", tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        square(engine(**TOWER.batches(1)[0])).backward()
        engine.clip_grad_norm_(1e-3)
        param = next(engine.parameters())
        param.grad = torch.ones_like(param)
        with pytest.raises(ModelError, match="after clip_grad_norm_"):
            optimizer.step()
        engine.zero_grad()
        optimizer.step()


def test_a_checkpoint_is_refused_while_grad_holds_something(tmp_path) -> None:
    with GeminiDDP(TOWER.model(), config_for("host")) as engine:
        hybrid_adam(engine.parameters())
        param = next(engine.parameters())
        param.grad = torch.ones_like(param)
        with pytest.raises(ConfigError, match="gradients wait for a step"):
            engine.save_checkpoint(tmp_path / "run")


def test_float16_refuses_gradients_whose_loss_scale_it_cannot_know() -> None:
    case = Case(TOWER.build, lambda generator: {"x": vector_batch(generator)["x"].half()}, square)
    with GeminiDDP(case.model(), config_for("host", dtype=torch.float16)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        by_assignment(square(engine(**case.batches(1)[0]).float()), list(engine.parameters()))
        with pytest.raises(ModelError, match=r"\.grad of blocks\.0.*float16.*loss\.backward"):
            optimizer.step()
        engine.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
def test_half_precision_gradients_may_come_once(place, tmp_path) -> None:
    fields = {"dtype": torch.bfloat16, "gradient_accumulation": False}
    case = Case(TOWER.build, lambda generator: {"x": vector_batch(generator)["x"].bfloat16()}, square)
    (batch,) = case.batches(1)
    with GeminiDDP(case.model(), config_for(place, tmp_path, **fields)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        by_assignment(square(engine(**batch)), list(engine.parameters()))
        optimizer.step()
        assert optimizer.last_grad_norm > 0
        square(engine(**batch)).backward()
        with pytest.raises(ModelError, match="second gradient"):
            next(engine.parameters()).grad += 1
        optimizer.zero_grad()
        square(engine(**batch)).backward()
        optimizer.step()


# ---------------------------------------------------------------- zeros that zero_grad leaves

USES = (0, 1, 0, 0, 1, 1)


@pytest.mark.parametrize("set_to_none", [True, False, "once"])
@pytest.mark.parametrize("whose", ["model", "optimizer"])
def test_zero_grad_leaves_what_torch_leaves(set_to_none, whose, config) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for index, (batch, use) in enumerate(zip(ROUTED.batches(len(USES)), USES, strict=True)):
            loss = square(model(**batch, use=use))
            loss.backward()
            optimizer.step()
            is_none = index != 3 if set_to_none == "once" else set_to_none
            (model if whose == "model" else optimizer).zero_grad(set_to_none=is_none)
            losses.append(loss.item())
        return losses

    assert_trains_alike(ROUTED, config, loop)


def test_zeros_are_left_for_gradients_that_no_step_has_used(config) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        first, second = ROUTED.batches(2)
        square(model(**first, use=1)).backward()
        optimizer.zero_grad(set_to_none=False)
        loss = square(model(**second, use=0))
        loss.backward()
        optimizer.step()
        return [loss.item()]

    assert_trains_alike(ROUTED, config, loop)


def test_zeros_make_a_step_without_any_backward(config) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        (batch,) = ROUTED.batches(1)
        loss = square(model(**batch, use=1))
        loss.backward()
        for _ in range(3):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return [loss.item()]

    assert_trains_alike(ROUTED, config, loop)


def test_zeros_go_with_half_precision_gradients(tmp_path) -> None:
    steps = []
    for place in ("host", "nvme"):
        config = config_for(place, tmp_path, dtype=torch.bfloat16, gradient_accumulation=False)
        with GeminiDDP(ROUTED.model(), config) as engine:
            optimizer = hybrid_adam(engine.parameters())
            for batch, use in zip(ROUTED.batches(len(USES)), USES, strict=True):
                square(engine(batch["x"].bfloat16(), use=use)).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            steps.append(sorted(state["step"] for state in optimizer.state.values()))
    num_block = len(list(Block().parameters()))
    assert steps[0] == steps[1] == [len(USES) - 1] * (num_block + 1) + [len(USES)] * (2 * num_block)
