"""Placement, budgets and machinery never change a bit; float32 agrees with torch.optim.AdamW."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import HF_CASES
from training_harness import Case, Run, config_for, distance, hybrid_adam, plain_adamw, same_bits, step, train_gemini

from gemini import GeminiConfig, GeminiDDP, NVMeConfig, OutOfTierMemoryError, StaticPlacement
from gemini.assembly.blueprint import draw_blueprint
from gemini.kernels.cpu import supported_isas
from gemini.tiers import MemoryTier

LLAMA = HF_CASES["llama"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa.name.lower() for isa in supported_isas()]


def short(value: Any) -> str:
    return str(value).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)


@cache
def expected(dtype: torch.dtype) -> Run:
    return train_gemini(LLAMA, config_for("host", dtype=dtype, isa="scalar", num_threads=1))


def assert_same_bits(config: GeminiConfig) -> None:
    run = train_gemini(LLAMA, config)
    assert run.losses == expected(config.dtype).losses
    assert same_bits(run.weights, expected(config.dtype).weights)


# ---------------------------------------------------------------- one thing at a time


@dtypes
@pytest.mark.parametrize("place", ["nvme", "device", "mixed", "resident"])
def test_placement_changes_no_bit(place, dtype, tmp_path):
    assert_same_bits(config_for(place, tmp_path, dtype=dtype))


@dtypes
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_instruction_set_changes_no_bit(isa, dtype, tmp_path):
    if isa not in ISAS:
        pytest.skip(f"this processor has no {isa}")
    assert_same_bits(config_for("mixed", tmp_path, dtype=dtype, isa=isa))


@pytest.mark.parametrize("place", ["nvme", "mixed"])
@pytest.mark.parametrize(
    "fields",
    [
        {"tile_numel": 8192},
        {"tile_numel": 1 << 20},
        {"prefetch_depth": 1},
        {"prefetch_depth": 3},
        {"num_threads": 1},
        {"num_threads": 5},
        {"ring_depth": 2},
        {"ring_depth": 9},
    ],
    ids=short,
)
def test_machinery_changes_no_bit(place, fields, tmp_path):
    assert_same_bits(config_for(place, tmp_path, dtype=torch.bfloat16, **fields))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("engine", ["io_uring", "aio", "threads"])
def test_io_engine_changes_no_bit(engine, direct, tmp_path):
    nvme = NVMeConfig(path=tmp_path, budget="256MiB", engine=engine, direct=direct, queue_depth=2)
    try:
        config = config_for("nvme", tmp_path, dtype=torch.bfloat16, nvme=nvme)
        run = train_gemini(LLAMA, config, 2)
    except OSError as error:
        pytest.skip(f"no {engine} here: {error}")
    assert run.losses == expected(torch.bfloat16).losses[:2]


@pytest.mark.parametrize("gradient_accumulation", [True, False])
def test_gradients_kept_as_bfloat16_change_no_bit(gradient_accumulation, tmp_path):
    config = config_for("mixed", tmp_path, dtype=torch.bfloat16, gradient_accumulation=gradient_accumulation)
    assert_same_bits(config)


# ---------------------------------------------------------------- budgets


def smallest(model: torch.nn.Module, field: str, **fields: Any) -> int:
    """Return the smallest budget, to 4 KiB, for which there is a plan."""
    low, high = 0, 4 << 20
    while high - low > 4096:
        middle = (low + high) // 2
        try:
            draw_blueprint(model, GeminiConfig(**{**fields, field: middle}))
        except OutOfTierMemoryError:
            low = middle
        else:
            high = middle
    return high


@pytest.mark.parametrize("slack", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_budgets_are_kept_and_change_no_bit(device, slack, tmp_path):
    fields: dict[str, Any] = {
        "device": device,
        "dtype": torch.bfloat16,
        "nvme": NVMeConfig(path=tmp_path, budget="64MiB", direct=False),
        "tile_numel": 4096,
        "num_threads": 2,
    }
    model = LLAMA.model()
    if device == "simulated":
        fields |= {"activation_reserve": 1, "host_budget": "64MiB"}
        fields["device_budget"] = int(smallest(model, "device_budget", **fields) * slack)
    fields["host_budget"] = int(smallest(model, "host_budget", **fields) * slack)
    config = GeminiConfig(**fields)
    with GeminiDDP(model, config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        losses = [step(engine, optimizer, LLAMA, batch) for batch in LLAMA.batches(3)]
        weights, ledger = engine.master_state_dict(), engine.runtime.resources.ledger
        assert ledger.peak_nbytes(MemoryTier.HOST) <= fields["host_budget"]
    assert losses == expected(torch.bfloat16).losses
    assert same_bits(weights, expected(torch.bfloat16).weights)


# ---------------------------------------------------------------- everything at once


fractions = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@st.composite
def placements(draw: st.DrawFn, has_device: bool) -> StaticPlacement:
    param_nvme, state_nvme = draw(fractions), draw(fractions)
    param_device = draw(st.floats(0, 1 - param_nvme)) if has_device else 0.0
    state_device = draw(st.floats(0, min(param_device, 1 - state_nvme)))
    grad_nvme = draw(st.floats(0, 1 - state_device))
    return StaticPlacement(
        param_device=param_device,
        state_device=state_device,
        param_nvme=param_nvme,
        state_nvme=state_nvme,
        grad_nvme=grad_nvme,
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nothing_changes_a_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    place = data.draw(st.sampled_from(["nvme", "mixed"]))
    config = config_for(
        place,
        tmp_path_factory.mktemp("swap"),
        dtype=data.draw(st.sampled_from(DTYPES)),
        placement=data.draw(placements(has_device=place == "mixed")),
        tile_numel=data.draw(st.sampled_from([4096, 8192, 1 << 20])),
        prefetch_depth=data.draw(st.sampled_from([0, 1, 3])),
        num_threads=data.draw(st.sampled_from([1, 2, 5])),
        ring_depth=data.draw(st.sampled_from([2, 4])),
        isa=data.draw(st.sampled_from(ISAS)),
    )
    assert_same_bits(config)


# ---------------------------------------------------------------- against torch


@pytest.mark.parametrize("place", ["host", "nvme"])
def test_float32_weights_after_100_steps_agree_with_torch_adamw(place, tmp_path: Path):
    case: Case = LLAMA
    model = case.model()
    reference = plain_adamw(model.parameters())
    with GeminiDDP(case.model(), config_for(place, tmp_path)) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in case.batches(100):
            step(model, reference, case, batch)
            step(engine, optimizer, case, batch)
        assert distance(engine.master_state_dict(), model.state_dict()) < 1e-6
