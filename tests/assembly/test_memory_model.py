"""Bytes measured beside bytes promised: ledger, swap file and resident memory against docs/memory_model.md."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S
from torch import nn

import gemini.assembly.assemble
from gemini import (
    GeminiConfig,
    GeminiDDP,
    HybridAdam,
    MemoryTier,
    ModelError,
    NVMeConfig,
    OutOfTierMemoryError,
    StaticPlacement,
)
from gemini.assembly.first_values import Initialiser
from gemini.model.flat_values import FlatValues
from gemini.offload.resources import Resources, open_resources

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
WIDTH = 96
KIB = 1 << 10
MIB = 1 << 20


class Block(nn.Module):
    """A residual block of 2 x (96 x 96 + 96) parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def make_config(directory: Path, **fields: Any) -> GeminiConfig:
    defaults = {
        "dtype": torch.float32,
        "device": "simulated",
        "device_budget": "16MiB",
        "host_budget": "16MiB",
        "nvme": NVMeConfig(path=directory, budget="16MiB"),
        "activation_reserve": 1,
        "tile_numel": 4096,
        "num_threads": 2,
    }
    return GeminiConfig(**{**defaults, **fields})


def train_step(engine: GeminiDDP, optimizer: HybridAdam) -> None:
    dtype = engine.runtime.config.dtype
    engine(torch.ones(2, WIDTH, dtype=dtype)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def check_bytes(engine: GeminiDDP, config: GeminiConfig) -> None:
    """Assert that each tier held what the formula says, and no more than its budget."""
    runtime = engine.runtime
    ledger, demand, store = runtime.resources.ledger, runtime.demand, runtime.resources.store
    for tier in (DEVICE, HOST):
        assert ledger.by_purpose(tier) == demand.by_purpose[tier]
        assert ledger.peak_nbytes(tier) == demand.total(tier)
        budget = ledger.budget_nbytes(tier)
        assert budget is None or ledger.peak_nbytes(tier) <= budget
    assert (0 if store is None else store.held_nbytes) == demand.total(NVME)
    if store is not None and config.nvme is not None:
        assert store.path.stat().st_size == demand.total(NVME) + 4096 <= config.nvme.budget_nbytes


def run_and_check(config: GeminiConfig) -> bool:
    """Train two steps and check all bytes; return False if the budgets cannot hold the model."""
    try:
        engine = GeminiDDP(make_model(), config)
    except OutOfTierMemoryError:
        return False
    with engine:
        check_bytes(engine, config)
        optimizer = HybridAdam(engine.parameters(), max_grad_norm=1.0)
        for _ in range(2):
            train_step(engine, optimizer)
        check_bytes(engine, config)
    check_nothing_is_held(engine.runtime.resources)
    return True


def check_nothing_is_held(resources: Resources) -> None:
    """Assert that no byte of any tier is taken any more."""
    assert [resources.ledger.by_purpose(tier) for tier in MemoryTier] == [{}, {}, {}]


PROPERTY = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(
    device_budget=st.integers(100 * KIB, 3 * MIB),
    host_budget=st.integers(300 * KIB, 3 * MIB),
    device=st.sampled_from(["cpu", "simulated"]),
    flags=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_budget_is_kept_and_every_byte_foretold(
    tmp_path: Path, device_budget: int, host_budget: int, device: str, flags: tuple[bool, bool], dtype: torch.dtype
) -> None:
    accumulates, verifies = flags
    config = make_config(
        tmp_path,
        device=device,
        nvme=NVMeConfig(path=tmp_path, budget="16MiB", verify=verifies),
        device_budget=device_budget if device == "simulated" else None,
        host_budget=host_budget,
        gradient_accumulation=accumulates,
        dtype=dtype,
    )
    run_and_check(config)


@PROPERTY
@given(
    fractions=st.tuples(*[st.sampled_from([0.0, 0.3, 0.5])] * 4),
    grad_nvme=st.sampled_from([0.0, 0.5]),
    ring_depth=st.integers(2, 5),
    prefetch_depth=st.integers(0, 3),
)
def test_every_static_placement_takes_what_the_formula_says(
    tmp_path: Path, fractions: tuple[float, ...], grad_nvme: float, ring_depth: int, prefetch_depth: int
) -> None:
    param_device, param_nvme, state_device, state_nvme = fractions
    placement = StaticPlacement(
        param_device=max(param_device, state_device),
        param_nvme=param_nvme,
        state_device=state_device,
        state_nvme=state_nvme,
        grad_nvme=grad_nvme,
    )
    config = make_config(tmp_path, placement=placement, ring_depth=ring_depth, prefetch_depth=prefetch_depth)
    assert run_and_check(config)


@pytest.mark.parametrize("num_read", [0, 3, 7])
def test_a_construction_that_fails_gives_everything_back(
    num_read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Resources] = []
    values_of, num_calls = Initialiser.values_of, itertools.count()

    def fail(self: Initialiser, name: str) -> FlatValues:
        if next(num_calls) == num_read:
            raise ModelError("no value to be had")
        return values_of(self, name)

    def open_and_keep(*args: Any, **kwargs: Any) -> Resources:
        opened.append(open_resources(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(Initialiser, "values_of", fail)
    monkeypatch.setattr(gemini.assembly.assemble, "open_resources", open_and_keep)
    placement = StaticPlacement(param_device=0.5, state_device=0.5, param_nvme=0.2, state_nvme=0.2)
    with pytest.raises(ModelError, match="no value to be had"):
        GeminiDDP(make_model(), make_config(tmp_path, placement=placement))
    check_nothing_is_held(opened[0])


def test_small_budgets_do_hold_this_model(tmp_path: Path) -> None:
    """The properties above are not vacuous."""
    assert run_and_check(make_config(tmp_path, device_budget="600KiB", host_budget="1200KiB"))
    assert run_and_check(make_config(tmp_path, device="cpu", device_budget=None, host_budget="1200KiB"))
    assert not run_and_check(make_config(tmp_path, device_budget="100KiB", host_budget="300KiB"))


def test_the_report_shows_formula_and_measurement_side_by_side(tmp_path: Path) -> None:
    with GeminiDDP(make_model(), make_config(tmp_path, placement=StaticPlacement(state_nvme=1))) as engine:
        train_step(engine, HybridAdam(engine.parameters()))
        report = engine.memory_report()
    for tier in report.tiers:
        assert tier.planned_nbytes == tier.held_nbytes
        assert tier.peak_nbytes == sum(tier.planned_nbytes.values())
    assert [tier.tier for tier in report.tiers] == ["device", "host", "nvme"]
    # Four blocks of 18,624 parameters: tiles of 4 x 4096 and 2,240, whose moments take 4 x 32,768 and 2 x 12,288 bytes.
    # Two blocks have second places, because their updates may come before the step.
    block_nbytes = 4 * 32_768 + 2 * 12_288
    assert report.tiers[2].planned_nbytes == {"state": 4 * block_nbytes, "state spares": 2 * block_nbytes}
    assert json.loads(report.to_json())["num_params"] == report.num_params == 4 * 18_624


# ---------------------------------------------------------------------- what is not model data


def test_activations_of_an_mlp_are_counted_to_the_byte(tmp_path: Path) -> None:
    """Peak in forward: every output lives until the next layer has made its own; nothing is saved."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 16))
    with GeminiDDP(model, make_config(tmp_path)) as engine:
        x = torch.ones(8, 64)
        with torch.no_grad(), engine.trace_memory():
            engine(x)
        # The first Linear's output (8 x 256 floats) and ReLU's; the last layer's (8 x 16) joins when the first is gone.
        assert engine.memory_report().non_model_peak_nbytes == 2 * 8 * 256 * 4


def test_what_autograd_saves_is_counted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 16))
    with GeminiDDP(model, make_config(tmp_path, device="cpu", device_budget=None)) as engine:
        assert engine.memory_report().non_model_peak_nbytes is None
        x = torch.ones(8, 64)
        with engine.trace_memory():
            loss = engine(x).sum()
            loss.backward()
        # At the end of backward: the loss and its gradient, the one at ReLU's input, and, until the worker pool has
        # stored them, all four parameters' gradients.
        num_floats = 2 + 8 * 256 + (16 * 256 + 16) + (256 * 64 + 256)
        assert engine.memory_report().non_model_peak_nbytes == num_floats * 4


# ---------------------------------------------------------------------- what the kernel counts

MEASURE = """
import gc, json, sys, threading, time
import torch
from torch import nn
from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement, MemoryTier

def resident(field="VmRSS"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

class Sampler(threading.Thread):
    peak = 0
    done = False
    def run(self):
        while not self.done:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)

def make():
    return nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.ReLU()) for _ in range(57)))

def step(engine, optimizer):
    engine(torch.ones(1, 1024)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

torch.set_num_threads(1)
config = dict(device="cpu", dtype=torch.float32, host_budget="2GiB", num_threads=2, overlap="next-forward",
              nvme=NVMeConfig(path=sys.argv[1], budget="2GiB"))
tiny = GeminiDDP(nn.Sequential(nn.Linear(64, 64)), GeminiConfig(**config))  # first use of everything
step_in = torch.ones(1, 64)
tiny(step_in).sum().backward()
tiny.close()
with torch.device("meta"):
    model = make()
gc.collect()
base = resident()
sampler = Sampler(daemon=True)
sampler.start()
engine = GeminiDDP(model, GeminiConfig(placement=StaticPlacement(state_nvme=1, param_nvme=1, grad_nvme=1), **config))
built = sampler.peak - base
optimizer = HybridAdam(engine.parameters())
for _ in range(int(sys.argv[2])):
    step(engine, optimizer)
sampler.done = True
sampler.join()
demand = engine.runtime.demand
print(json.dumps(dict(built=built, trained=sampler.peak - base, host=demand.total(MemoryTier.HOST),
                      nvme=demand.total(MemoryTier.NVME), params=engine.memory_report().num_params)))
engine.close()
"""


@pytest.mark.slow
def test_resident_memory_stays_within_the_formula_while_building_and_training(tmp_path: Path) -> None:
    """60 million parameters, 956 MiB with their state and gradients, pass through little host memory."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "1"], capture_output=True, text=True, env=env, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["params"] == 57 * 2**20
    assert found["nvme"] == 16 * 57 * 2**20
    assert found["host"] < 128 * MIB
    allowance = 48 * MIB  # one unit while it is initialised, activations, and what torch's allocator keeps
    assert found["built"] <= found["host"] + allowance
    assert found["trained"] <= found["host"] + allowance
