"""The same contract on a GPU: every placement gives the same bits, and the budget is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from small_resources import small_resources
from torch import nn
from training_harness import PLACEMENTS, Case, config_for, distance, hybrid_adam, same_bits, train_gemini

from gemini import GeminiConfig, GeminiDDP, HybridAdam, StaticPlacement
from gemini.errors import OutOfTierMemoryError
from gemini.offload.resources import Resources

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


@pytest.mark.parametrize("place", ["device", "mixed", "resident"])
def test_no_overlap_and_no_stream_changes_a_bit_on_a_gpu(place, tmp_path):
    """Evaluation between backward and step leaves compute that nobody waits for."""
    case = stack_case(torch.bfloat16)

    def train(overlap: str, stream: torch.cuda.Stream) -> dict[str, torch.Tensor]:
        config = on_cuda(config_for(place, tmp_path, dtype=torch.bfloat16, overlap=overlap))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), GeminiDDP(case.model(), config) as engine:
            optimizer = hybrid_adam(engine.parameters(), max_grad_norm=0.5)
            for batch in case.batches(6):
                engine(**batch).backward()
                with torch.no_grad():
                    engine(**batch)
                optimizer.step()
            return engine.master_state_dict()

    expected = train("off", torch.cuda.default_stream())
    for overlap in ("off", "next-forward", "speculative"):
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            assert same_bits(train(overlap, stream), expected), (overlap, stream)


def test_slices_give_the_same_bits_every_time_on_a_gpu(tmp_path):
    case = stack_case(torch.bfloat16)
    runs = [
        train_gemini(case, on_cuda(config_for("device", tmp_path, dtype=torch.bfloat16, num_batch_slices=count)))
        for count in (4, 4)
    ]
    assert runs[0].losses == runs[1].losses
    assert same_bits(runs[0].weights, runs[1].weights)


@pytest.mark.parametrize("overlap", ["off", "next-forward"])
@pytest.mark.parametrize("placement", ["auto", StaticPlacement(), StaticPlacement(param_device=0.3)])
def test_the_device_budget_is_kept_in_every_step(placement, overlap):
    budget = 96 << 20
    config = GeminiConfig(
        device="cuda",
        device_budget=budget,
        activation_reserve="32MiB",
        host_budget="8GiB",
        placement=placement,
        overlap=overlap,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with GeminiDDP(Stack(num_blocks=32), config) as engine:  # 134 MB of weights in bf16
        optimizer = HybridAdam(engine.parameters())
        for _ in range(4):
            engine(torch.randn(64, HIDDEN, device="cuda", dtype=torch.bfloat16)).backward()
            optimizer.step()
            assert torch.cuda.max_memory_allocated() - before <= budget  # the engine resets it in every step
        assert engine.memory_report().non_model_peak_nbytes is not None


@pytest.fixture
def cuda_resources() -> Iterator[Resources]:
    with small_resources(device="cuda", device_budget="64MiB") as resources:
        yield resources


def test_an_upload_after_a_mark_waits_for_no_later_compute(cuda_resources):
    transfers = cuda_resources.transfers
    there, here = transfers.allocate(1 << 20, "slots"), cuda_resources.arena.allocate(1 << 20, "working").fill_(7)
    transfers.upload(there, here).wait_on_host()  # everything has been loaded
    mark = transfers.mark()
    torch.cuda._sleep(10**9)  # about half a second
    busy = torch.cuda.current_stream().record_event()
    transfers.upload(there, here, after=mark).wait_on_host()
    assert not busy.query()
    ordered = transfers.upload(there, here)
    assert not ordered.is_done()
    ordered.wait_on_host()
    assert busy.query()


def test_only_what_is_copied_is_page_locked(cuda_resources):
    assert cuda_resources.arena.allocate(4096, "working").is_pinned()
    assert not cuda_resources.arena.allocate(4096, "state").is_pinned()


def test_no_kernel_is_blamed_for_a_refusal_to_lock(cuda_resources):
    buffer = cuda_resources.arena.allocate(4096, "working")
    assert not cuda_resources.arena._lock(buffer)  # it is locked already
    assert torch.ones(1, device="cuda").item() == 1.0


def test_what_the_device_refuses_is_an_error_of_the_tier():
    with (
        small_resources(device="cuda", device_budget="900GiB") as resources,
        pytest.raises(OutOfTierMemoryError, match="refused .* for slots, which device_budget allows"),
    ):
        resources.transfers.allocate(800 << 30, "slots")
    assert torch.ones(1, device="cuda").item() == 1.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_an_engine_on_the_second_gpu_takes_nothing_of_the_first(tmp_path):
    before = torch.cuda.memory_reserved(0), torch.cuda.mem_get_info(0)[0]
    config = on_cuda(config_for("device", tmp_path, dtype=torch.bfloat16, overlap="next-forward"), device="cuda:1")
    with GeminiDDP(Stack(), config) as engine:
        optimizer = HybridAdam(engine.parameters())
        for _ in range(3):
            engine(torch.randn(64, HIDDEN, device="cuda:1", dtype=torch.bfloat16)).backward()
            optimizer.step()
    assert (torch.cuda.memory_reserved(0), torch.cuda.mem_get_info(0)[0]) == before


def test_closing_gives_all_device_memory_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with GeminiDDP(Stack(), GeminiConfig(device="cuda", device_budget="1GiB", host_budget="2GiB")) as engine:
        engine(torch.randn(64, HIDDEN, device="cuda", dtype=torch.bfloat16)).backward()
    del engine
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
