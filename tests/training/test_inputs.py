"""Floating-point inputs reach the model in its working dtype, as under FSDP2, and gradients come back in their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from gemini import ConfigError, GeminiConfig, GeminiDDP, HybridAdam

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclasses.dataclass(frozen=True)
class Batch:
    values: torch.Tensor
    places: list[torch.Tensor]


class Recording(nn.Module):
    """Notes the dtypes of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
        found = {"x": x, **{name: value for name, value in more.items() if isinstance(value, torch.Tensor)}}
        if "batch" in more:
            found |= {"values": more["batch"].values, "place": more["batch"].places[0]}
        if "pair" in more:
            found["second"] = more["pair"]["second"][1]
        self.seen = {name: value.dtype for name, value in found.items()}
        return self.inner(x)  # type: ignore[no-any-return]


def config(dtype: torch.dtype, **fields: Any) -> GeminiConfig:
    return GeminiConfig(device="cpu", dtype=dtype, host_budget="64MiB", num_threads=1, **fields)


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floats_are_cast_wherever_they_are_and_nothing_else_is(dtype: torch.dtype, given: torch.dtype) -> None:
    model = Recording()
    floats = torch.ones(2, 8, dtype=given)
    with GeminiDDP(model, config(dtype)) as engine:
        for call in (engine, model):
            out = call(
                floats,
                mask=floats,
                ids=torch.ones(2, dtype=torch.int32),
                flags=torch.ones(2, dtype=torch.bool),
                small=torch.ones(2).to(torch.float8_e5m2),
                waves=torch.ones(2, dtype=torch.complex64),
                batch=Batch(floats, [torch.arange(3)]),
                pair={"second": (1, floats)},
                name="kept",
            )
            assert out.dtype is dtype
            assert model.seen == {
                **dict.fromkeys(("x", "mask", "values", "second"), dtype),
                **{"ids": torch.int32, "flags": torch.bool, "small": torch.float8_e5m2},
                **{"waves": torch.complex64, "place": torch.int64},
            }
    assert floats.dtype is given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_inputs_are_those_of_a_cast_in_the_model(dtype: torch.dtype) -> None:
    plain, x, y = Recording().to(dtype), torch.randn(2, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    model = Recording()
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        param.data.copy_(other)
    plain(x.to(dtype)).float().square().sum().backward()
    with torch.no_grad():
        y.copy_(x)
    with GeminiDDP(model, config(dtype)) as engine:
        engine(y).float().square().sum().backward()
    assert y.grad is not None
    assert y.grad.dtype is torch.float32
    assert torch.equal(y.grad, x.grad)  # type: ignore[arg-type]


def test_a_float32_loop_trains_a_half_precision_model() -> None:
    with GeminiDDP(Recording(), config(torch.bfloat16)) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = engine(x=torch.ones(2, 8)).float().square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_modules_inside_are_given_what_they_are_called_with() -> None:
    model = Recording()
    with GeminiDDP(nn.ModuleList([model]), config(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="dtype"):
            model(torch.ones(2, 8))
        assert model.seen == {"x": torch.float32}


def test_inputs_stay_as_they_are_where_that_is_asked_for() -> None:
    model = Recording()
    with GeminiDDP(model, config(torch.bfloat16, cast_forward_inputs=False)) as engine:
        engine(torch.ones(2, 8, dtype=torch.bfloat16), times=torch.ones(2))
    assert model.seen == {"x": torch.bfloat16, "times": torch.float32}


def test_a_switch_that_is_no_bool_is_refused() -> None:
    with pytest.raises(ConfigError, match="cast_forward_inputs: expected True or False"):
        config(torch.bfloat16, cast_forward_inputs="no")
