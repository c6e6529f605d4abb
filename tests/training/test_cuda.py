"""The same contract on a GPU: every placement gives the same bits, and the budget is kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from training_harness import PLACEMENTS, Case, config_for, distance, train_gemini

from gemini import GeminiConfig, GeminiDDP, HybridAdam

pytestmark = pytest.mark.gpu

HIDDEN = 512


class Block(nn.Module):
    """A residual block heavy enough for copies to be under way while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks in a row and a squared loss."""

    def __init__(self, num_blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


def on_cuda(config: GeminiConfig, **fields: object) -> GeminiConfig:
    return dataclasses.replace(config, **{"device": "cuda", "device_budget": "2GiB", **fields})


def stack_case(dtype: torch.dtype) -> Case:
    return Case(
        build=Stack,
        batch=lambda generator: {"x": torch.randn(256, HIDDEN, generator=generator).to("cuda", dtype)},
        loss=lambda output: output,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_placement_gives_the_same_bits_on_a_gpu(dtype, tmp_path):
    case = stack_case(dtype)
    runs = [
        train_gemini(case, on_cuda(config_for(place, tmp_path, dtype=dtype)), num_steps=5)
        for place in PLACEMENTS
        if place not in ("host", "nvme")  # those compute on the CPU
    ]
    for run in runs[1:]:
        assert run.losses == runs[0].losses
        assert distance(run.weights, runs[0].weights) == 0


def test_prefetching_does_not_change_a_bit_on_a_gpu(tmp_path):
    case = stack_case(torch.bfloat16)
    config = on_cuda(config_for("device", tmp_path, dtype=torch.bfloat16))
    runs = [train_gemini(case, dataclasses.replace(config, prefetch_depth=depth), num_steps=5) for depth in (0, 1, 4)]
    assert all(run.losses == runs[0].losses for run in runs)
    assert all(distance(run.weights, runs[0].weights) == 0 for run in runs)


def test_the_device_budget_is_kept():
    budget = 96 << 20
    config = GeminiConfig(device="cuda", device_budget=budget, activation_reserve="32MiB", host_budget="8GiB")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with GeminiDDP(Stack(num_blocks=32), config) as engine:  # 134 MB of weights in bf16
        optimizer = HybridAdam(engine.parameters())
        for _ in range(4):
            engine(torch.randn(64, HIDDEN, device="cuda", dtype=torch.bfloat16)).backward()
            optimizer.step()
        peak = torch.cuda.max_memory_allocated() - before
        assert engine.memory_report().non_model_peak_nbytes is not None
    assert peak <= budget


def test_closing_gives_all_device_memory_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with GeminiDDP(Stack(), GeminiConfig(device="cuda", device_budget="1GiB", host_budget="2GiB")) as engine:
        engine(torch.randn(64, HIDDEN, device="cuda", dtype=torch.bfloat16)).backward()
    del engine
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
