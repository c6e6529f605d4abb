"""bfloat16 and float16: what is computed, to the bit, and what happens to gradients that overflow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from model_zoo import Tower, square, vector_batch
from torch import nn
from training_harness import (
    EPS,
    LR,
    WEIGHT_DECAY,
    Case,
    config_for,
    distance,
    hybrid_adam,
    same_bits,
    step,
    train_plain,
)

from gemini import GeminiDDP

BETA1, BETA2 = 0.9, 0.999
TOWER = Case(lambda: Tower(num_blocks=3), vector_batch, square)


@pytest.fixture(params=["host", "nvme", "device", "mixed", "resident"])
def place(request):
    return request.param


# ---------------------------------------------------------------- bfloat16


def nearest_bf16(master: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16, ties away from zero, as gn_split_master does."""
    return ((master.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def ieee_sqrt(values: torch.Tensor) -> torch.Tensor:
    """Return correctly rounded roots; torch.sqrt on the CPU comes from MKL and is an ulp off now and then."""
    return torch.from_numpy(np.sqrt(values.numpy()))


class MasterAdamW:
    """AdamW on float32 masters of a bfloat16 model, in gn_adam_update's order of operations."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.masters = [param.detach().clone() for param in self.params]
        self.moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in self.masters]
        self.num_steps = 0
        model.to(torch.bfloat16)
        self._show()

    def _show(self) -> None:
        for param, master in zip(self.params, self.masters, strict=True):
            param.data = nearest_bf16(master)

    def step(self, grads: list[torch.Tensor]) -> None:
        self.num_steps += 1
        step_size, bias2_sqrt = LR / (1 - BETA1**self.num_steps), math.sqrt(1 - BETA2**self.num_steps)
        for master, (momentum, variance), grad in zip(self.masters, self.moments, grads, strict=True):
            momentum.copy_(momentum + (1 - BETA1) * (grad - momentum))
            variance.copy_(variance * BETA2 + ((1 - BETA2) * grad) * grad)
            decayed = master * (1 - LR * WEIGHT_DECAY)
            master.copy_(decayed + (-step_size * momentum) / (ieee_sqrt(variance) / bias2_sqrt + EPS))
        self._show()


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_bfloat16_equals_torch_with_a_float32_master_bit_by_bit(place, tmp_path, num_micro_batches):
    def forward(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        return square(model(batch["x"].bfloat16()).float())

    model, batches = TOWER.model(), TOWER.batches(3 * num_micro_batches)
    reference, expected, found = MasterAdamW(model), [], []
    for begin in range(0, len(batches), num_micro_batches):
        sums = [torch.zeros_like(master) for master in reference.masters]
        for batch in batches[begin : begin + num_micro_batches]:
            loss = forward(model, batch)
            for total, grad in zip(sums, torch.autograd.grad(loss, reference.params), strict=True):
                total += grad.float()
            expected.append(loss.item())
        reference.step(sums)
    with GeminiDDP(TOWER.model(), config_for(place, tmp_path, dtype=torch.bfloat16)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for index, batch in enumerate(batches, 1):
            loss = forward(engine, batch)
            loss.backward()
            found.append(loss.item())
            if index % num_micro_batches == 0:
                optimizer.step()
        masters, working = engine.master_state_dict(), engine.state_dict()
    names = [name for name, _ in model.named_parameters()]
    assert found == expected
    assert same_bits(masters, dict(zip(names, reference.masters, strict=True)))
    assert same_bits(working, model.state_dict())


def test_a_second_backward_is_refused_where_gradients_are_kept_as_bfloat16(place, tmp_path):
    config = config_for(place, tmp_path, dtype=torch.bfloat16, gradient_accumulation=False)
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        batch = TOWER.batches(1)[0]["x"].bfloat16()
        square(engine(batch)).backward()
        with pytest.raises(RuntimeError, match=r"set GeminiConfig\(gradient_accumulation=True\)"):
            square(engine(batch)).backward()
        optimizer.zero_grad()
        square(engine(batch)).backward()
        optimizer.step()
        assert optimizer.last_grad_norm > 0


# ---------------------------------------------------------------- float16


HALF = Case(TOWER.build, lambda generator: {"x": vector_batch(generator)["x"].half()}, lambda y: square(y.float()))


def test_float16_overflow_skips_the_step_halves_the_scale_and_recovers(place, tmp_path):
    config = config_for(place, tmp_path, dtype=torch.float16, initial_loss_scale=2.0**30)
    with GeminiDDP(HALF.model(), config) as engine:
        optimizer, scaler = hybrid_adam(engine.parameters()), engine.runtime.coming.scaler
        before = engine.master_state_dict()
        step(engine, optimizer, HALF, HALF.batches(1)[0])
        assert math.isnan(optimizer.last_grad_norm)
        assert scaler.scale == 2.0**29
        assert same_bits(engine.master_state_dict(), before)
        assert not optimizer.state
        for batch in HALF.batches(20):
            step(engine, optimizer, HALF, batch)
        assert math.isfinite(optimizer.last_grad_norm)
        assert engine.runtime.steps.num_steps + engine.runtime.steps.num_skipped_steps == 21
        assert distance(engine.master_state_dict(), before) > 1e-4


def test_float16_trains_like_float32(place, tmp_path):
    expected = train_plain(TOWER)
    with GeminiDDP(HALF.model(), config_for(place, tmp_path, dtype=torch.float16)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        losses = [step(engine, optimizer, HALF, batch) for batch in HALF.batches(3)]
        assert losses == pytest.approx(expected.losses, rel=1e-2)
        assert distance(engine.master_state_dict(), expected.weights) < 2e-3


@dataclass
class Output:
    """What a model may return that torch's pytrees do not know."""

    hidden: torch.Tensor
    extra: dict[str, torch.Tensor]


class ReturnsOutput(Tower):
    def forward(self, x: torch.Tensor) -> Any:
        hidden = super().forward(x)
        return Output(hidden, {"mean": hidden.mean()})


def test_the_loss_scale_is_taken_out_again_whatever_the_model_returns(tmp_path):
    norms = {}
    for build, loss in ((Tower, square), (ReturnsOutput, lambda output: square(output.hidden))):
        case = Case(build, HALF.batch, loss)
        with GeminiDDP(case.model(), config_for("host", tmp_path, dtype=torch.float16)) as engine:
            optimizer = hybrid_adam(engine.parameters())
            step(engine, optimizer, case, case.batches(1)[0])
            norms[build] = optimizer.last_grad_norm
    assert norms[ReturnsOutput] == norms[Tower]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(place, tmp_path, dtype, caplog):
    with GeminiDDP(TOWER.model(), config_for(place, tmp_path, dtype=dtype)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        batch = TOWER.batches(1)[0]["x"].to(dtype)
        before = engine.master_state_dict()
        (square(engine(batch)) * math.inf).backward()
        optimizer.step()
        assert same_bits(engine.master_state_dict(), before)
        assert "skipped" in caplog.text
        square(engine(batch)).backward()
        optimizer.step()
        assert not same_bits(engine.master_state_dict(), before)
