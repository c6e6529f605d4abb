"""Where the device has room, gradients of several backward passes leave it once, with the bits they always had."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_chunk_spec
from model_zoo import HF_CASES, HIDDEN, Block, Tower, square, vector_batch
from torch import nn
from training_harness import Case, config_for, hybrid_adam, same_bits

import gemini.config
from gemini import GeminiDDP, HybridAdam, MemoryReport
from gemini.assembly.blueprint import draw_blueprint
from gemini.gradients.accumulators import GradientAccumulators
from gemini.kernels.device import select_device_kernels
from gemini.offload.transfer import CpuTransfers, SimulatedTransfers
from gemini.placement.accumulators import choose_accumulators
from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan
from gemini.tiers import MemoryTier, format_nbytes, round_up

LLAMA = HF_CASES["llama"]
DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
KIB = 1 << 10

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


class Skipping(Tower):
    """Uses its last block only for some batches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = list(self.blocks) if x[0, 0, 0] > 0 else list(self.blocks)[:-1]
        for block in blocks:
            x = block(x)
        return self.head(x)


TOWER = Case(Tower, vector_batch, square)
SKIPPING = Case(Skipping, vector_batch, square)
STACK, HALF_STACK = (
    Case(
        lambda: nn.Sequential(*(Block() for _ in range(6))),
        lambda generator, dtype=dtype: {"input": torch.randn(2, 16, HIDDEN, generator=generator).to(dtype)},
        square,
    )
    for dtype in (torch.float32, torch.bfloat16)
)


def auto_config(tmp_path: Path | None = None, **fields: Any) -> Any:
    """Return a configuration for which there is little room on the device until the first step has been measured."""
    place = "mixed" if tmp_path is not None else "device"
    return config_for(place, tmp_path, **{"placement": "auto", "device_budget": "1MiB", **fields})


@pytest.fixture(autouse=True)
def _little_room_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_at_first(monkeypatch, 750 / 1024)


def keep_at_first(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    """Keep a part of the device budget free until the first step has been measured."""
    monkeypatch.setattr(gemini.config, "DEFAULT_ACTIVATION_RESERVE", fraction)


def accumulator_nbytes(engine: GeminiDDP) -> int:
    return engine.runtime.resources.ledger.by_purpose(DEVICE).get("gradient accumulators", 0)


PASSES = (2, 3, 3, 1, 4, 2)
"""Backward passes of each step."""
Disturbance = Callable[[GeminiDDP, HybridAdam, int, int], None]
"""Does something after a backward pass; is given the numbers of the step and of the pass in it."""


def train(
    case: Case,
    config: Any,
    num_passes: Sequence[int] = PASSES,
    disturb: Disturbance = lambda *args: None,
    **optimizer_fields: Any,
) -> tuple[list[float], dict[str, torch.Tensor], MemoryReport]:
    """Train; return losses, weights and a report. Each backward pass is followed by a disturbance."""
    batches = iter(case.batches(sum(num_passes)))
    losses = []
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters(), **optimizer_fields)
        for num_steps, passes in enumerate(num_passes):
            for index in range(passes):
                loss = case.loss(measured(engine, next(batches), is_first=num_steps == 0)) / passes
                loss.backward()
                losses.append(loss.item())
                disturb(engine, optimizer, num_steps, index)
            assert num_steps or not accumulator_nbytes(engine)
            optimizer.step()
            optimizer.zero_grad()
        return losses, engine.master_state_dict(), engine.memory_report()


def measured(engine: GeminiDDP, batch: dict[str, Any], *, is_first: bool) -> Any:
    """Run a forward; measure it in the first step, as a GPU always does."""
    if not is_first:
        return engine(**batch)
    with engine.trace_memory():
        return engine(**batch)


# ---------------------------------------------------------------- the same bits


def assert_same_bits(case: Case, config: Any, dtype: torch.dtype = torch.float32) -> None:
    """Compare steps of two to four backward passes, some of which come unexpectedly, with what the host gives."""
    found = train(case, config, max_grad_norm=0.5)
    expected = train(case, config_for("host", dtype=dtype), max_grad_norm=0.5)
    assert found[2].accumulator_nbytes > 0
    assert expected[2].accumulator_nbytes == 0
    assert found[0] == expected[0]
    assert same_bits(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_on_the_device_change_no_bit(dtype):
    assert_same_bits(LLAMA, auto_config(dtype=dtype), dtype)


def test_tied_weights_change_no_bit():
    assert_same_bits(HF_CASES["gpt2"], auto_config())


def test_parameters_that_some_passes_leave_unused_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    keep_at_first(monkeypatch, 880 / 1024)
    assert_same_bits(SKIPPING, auto_config())


@pytest.mark.parametrize(
    ("dtype", "host_kib"), [(torch.float32, 380), (torch.float32, 430), (torch.bfloat16, 300), (torch.float16, 310)]
)
def test_sums_on_their_way_to_disk_change_no_bit(dtype, host_kib, tmp_path):
    config = auto_config(tmp_path, dtype=dtype, host_budget=host_kib * KIB, ring_depth=2)
    assert NVME in {homes.grad for homes in draw_blueprint(LLAMA.model(), config).plan.chunks}
    assert_same_bits(LLAMA, config, dtype)


class LateMove:
    """A copy that takes place at the last moment: when it is waited for."""

    def __init__(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        self._pair: tuple[torch.Tensor, torch.Tensor] | None = (dst, src)

    def is_done(self) -> bool:
        return self._pair is None

    def wait_on_host(self) -> None:
        if self._pair is not None:
            self._pair[0].copy_(self._pair[1])
        self._pair = None

    wait_on_compute = wait_on_host


class LateTransfers(CpuTransfers):
    """A device whose copies are late."""

    def __init__(self) -> None:
        pass

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def download(self, dst: torch.Tensor, src: torch.Tensor, *, record: str = "") -> LateMove:
        return LateMove(dst, src)


@pytest.mark.parametrize("host_kib", [None, 380])
def test_nobody_reads_sums_or_adds_to_them_before_they_have_left(host_kib, tmp_path, monkeypatch):
    monkeypatch.setattr(SimulatedTransfers, "download", lambda self, dst, src, record: LateMove(dst, src))
    sizes = {"host_budget": host_kib * KIB, "ring_depth": 2} if host_kib else {}
    assert_same_bits(LLAMA, auto_config(tmp_path if host_kib else None, **sizes))


def test_a_sum_on_its_way_is_left_alone_until_it_has_left():
    spec = make_chunk_spec([3], is_padded=False)
    accumulators = GradientAccumulators(LateTransfers(), select_device_kernels(torch.device("cpu")))
    accumulators.open(spec)
    host = torch.zeros(12, dtype=torch.uint8)
    accumulators.add(0, 0, torch.tensor([1.0, 2.0, 3.0]))
    accumulators.send(0, host)
    accumulators.add(0, 0, torch.ones(3))
    assert host.view(torch.float32).tolist() == [1.0, 2.0, 3.0]
    accumulators.send(0, host)
    accumulators.wait(0)
    assert host.view(torch.float32).tolist() == [2.0, 3.0, 4.0]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("host_kib", [430, 600])
@pytest.mark.parametrize("overlap", ["off", "next-forward", "speculative"])
def test_overlapped_updates_change_no_bit(overlap, host_kib, tmp_path):
    found = train(LLAMA, auto_config(tmp_path, overlap=overlap, host_budget=host_kib * KIB, ring_depth=2))
    expected = train(LLAMA, config_for("host", overlap="off"))
    assert found[2].accumulator_nbytes > 0
    assert found[0] == expected[0]
    assert same_bits(found[1], expected[1])


# ---------------------------------------------------------------- disturbances


def evaluate(engine: GeminiDDP, optimizer: HybridAdam, num_steps: int, index: int) -> None:
    """Run a forward without gradients, and read the weights."""
    with torch.no_grad():
        engine(**LLAMA.batches(1, seed=7)[0])
    engine.master_state_dict()


def drop(engine: GeminiDDP, optimizer: HybridAdam, num_steps: int, index: int) -> None:
    """Throw the gradients of the first pass, or of the first two, away."""
    if (num_steps, index) in ((1, 1), (2, 0), (4, 0)):
        optimizer.zero_grad()


def poison(engine: GeminiDDP, optimizer: HybridAdam, num_steps: int, index: int) -> None:
    """Let a gradient of the second pass of two steps be NaN."""
    param = next(engine.module.parameters())
    if num_steps in (1, 4) and index == 0:
        engine.poison = param.register_hook(lambda grad: grad * math.nan)
    elif num_steps in (1, 4) and index == 1:
        engine.poison.remove()


def clip_by_hand(engine: GeminiDDP, optimizer: HybridAdam, num_steps: int, index: int) -> None:
    """Ask for the norm in each pass, and clip in the last one."""
    engine.clip_grad_norm_(1e-3 if index == PASSES[num_steps] - 1 else math.inf)


def fail_half_way(engine: GeminiDDP, optimizer: HybridAdam, num_steps: int, index: int) -> None:
    """Let a backward pass fail when it has delivered some of its gradients, and begin the step anew."""
    if (num_steps, index) not in ((1, 1), (2, 0), (4, 0)):
        return

    def fail(grad: torch.Tensor) -> None:
        raise RuntimeError("half way")

    handle = next(engine.module.parameters()).register_hook(fail)
    loss = engine(**LLAMA.batches(1, seed=7)[0]).loss
    with pytest.raises(RuntimeError, match="half way"):
        loss.backward()
    handle.remove()
    optimizer.zero_grad()


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("host_kib", [None, 430])
@pytest.mark.parametrize("disturb", [evaluate, drop, poison, clip_by_hand, fail_half_way])
def test_what_happens_between_passes_changes_no_bit(disturb, host_kib, tmp_path):
    sizes = {"host_budget": host_kib * KIB, "ring_depth": 2} if host_kib else {}
    found = train(LLAMA, auto_config(tmp_path if host_kib else None, **sizes), disturb=disturb)
    expected = train(LLAMA, config_for("host", overlap="off"), disturb=disturb)
    assert found[2].accumulator_nbytes > 0
    assert found[2].num_skipped_steps == expected[2].num_skipped_steps == (2 if disturb is poison else 0)
    assert found[0] == expected[0]
    assert same_bits(found[1], expected[1])


# ---------------------------------------------------------------- traffic and memory


def downloaded_nbytes(engine: GeminiDDP, case: Case, num_passes: int) -> list[int]:
    """Return the bytes that leave the device in each of four steps; all have left when backward ends."""
    batches = iter(case.batches(4 * num_passes))
    optimizer, traffic = hybrid_adam(engine.parameters()), engine.runtime.resources.transfers.traffic
    moved = []
    for num_steps in range(4):
        before = traffic.downloaded_nbytes
        for _ in range(num_passes):
            case.loss(measured(engine, next(batches), is_first=num_steps == 0)).backward()
        moved.append(traffic.downloaded_nbytes - before)
        optimizer.step()
        assert traffic.downloaded_nbytes - before == moved[-1]
    return moved


def travelling_nbytes(engine: GeminiDDP, itemsize: int) -> dict[int, int]:
    """Return the bytes of each chunk's gradients that wait below the device, from the first parameter to the last."""
    return {
        chunk.chunk_id: itemsize
        * (max(place.end for place in chunk.places) - min(place.begin for place in chunk.places))
        for chunk in engine.runtime.layout.chunks
        if engine.runtime.plan.chunks[chunk.chunk_id].grad is not DEVICE
    }


@pytest.mark.parametrize("num_passes", [2, 4, 8])
def test_gradients_leave_once_however_many_passes_there_are(num_passes):
    with GeminiDDP(TOWER.model(), auto_config()) as engine:
        once = sum(travelling_nbytes(engine, 4).values())
        first, *others = downloaded_nbytes(engine, TOWER, num_passes)
    assert first == num_passes * once > 0
    assert others == [once] * 3


@pytest.mark.parametrize(("dtype", "device_kib"), [(torch.float32, 400), (torch.bfloat16, 200)])
def test_gradients_without_room_for_a_sum_leave_in_each_pass(dtype, device_kib, monkeypatch: pytest.MonkeyPatch):
    keep_at_first(monkeypatch, 0.5)
    config = auto_config(dtype=dtype, device_budget=device_kib * KIB)
    case = STACK if dtype is torch.float32 else HALF_STACK
    with GeminiDDP(case.model(), config) as engine:
        each = travelling_nbytes(engine, dtype.itemsize)
        sums = travelling_nbytes(engine, 4)
        first, *others = downloaded_nbytes(engine, case, 3)
        accumulators, chunks = engine.runtime.gradients.accumulators, engine.runtime.core.chunks
        summed = [chunk_id for chunk_id in each if chunk_id in accumulators]
        assert 0 < len(summed) < len(each)
        assert all(chunks[chunk_id].is_resident for chunk_id in summed)
        assert accumulator_nbytes(engine) == sum(round_up(sums[chunk_id], 4096) for chunk_id in summed)
    assert first == 3 * sum(each.values())
    assert others == [3 * sum(each.values()) + sum(sums[i] - 3 * each[i] for i in summed)] * 3


def test_sums_that_are_dropped_travel_nowhere():
    with GeminiDDP(TOWER.model(), auto_config()) as engine:
        downloaded_nbytes(engine, TOWER, 3)
        traffic, (batch,) = engine.runtime.resources.transfers.traffic, TOWER.batches(1)
        before = traffic.downloaded_nbytes
        square(engine(**batch)).backward()
        engine.zero_grad()
        assert traffic.downloaded_nbytes == before


def test_one_pass_a_step_takes_no_room_for_sums():
    assert train(TOWER, auto_config(), num_passes=(1, 1, 1))[2].accumulator_nbytes == 0


def test_a_plan_given_by_the_user_gets_no_sums():
    assert train(TOWER, config_for("device"), num_passes=(2, 2, 2))[2].accumulator_nbytes == 0


class Either(nn.Module):
    """Uses one of two towers, so that two backward passes need not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([Tower(), Tower()])

    def forward(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return self.towers[index](x)


def test_gradients_kept_in_the_working_dtype_get_no_sums():
    config = auto_config(dtype=torch.bfloat16, gradient_accumulation=False)
    with GeminiDDP(Either(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for num_steps in range(3):
            for index in range(2):
                batch = {"index": index, "x": torch.randn(2, 16, HIDDEN, dtype=torch.bfloat16)}
                square(measured(engine, batch, is_first=num_steps == 0)).backward()
            optimizer.step()
        assert engine.memory_report().num_steps == 3
        assert accumulator_nbytes(engine) == 0


@pytest.mark.parametrize("device_kib", [330, 400, 500, 1024])
def test_the_device_budget_is_kept(device_kib, monkeypatch: pytest.MonkeyPatch):
    keep_at_first(monkeypatch, 200 / device_kib)
    config = auto_config(device_budget=device_kib * KIB)
    with GeminiDDP(STACK.model(), config) as engine:
        downloaded_nbytes(engine, STACK, 2)
        peak = engine.memory_report().non_model_peak_nbytes
        ledger = engine.runtime.resources.ledger
        assert ledger.peak_nbytes(DEVICE) + peak <= device_kib * KIB


def test_the_report_shows_the_sums():
    report = train(TOWER, auto_config(), num_passes=(2, 2))[2]
    (device,) = [tier for tier in report.tiers if tier.tier == DEVICE.value]
    assert report.accumulator_nbytes == device.held_nbytes["gradient accumulators"] > 0
    assert json.loads(report.to_json())["accumulator_nbytes"] == report.accumulator_nbytes
    size = format_nbytes(report.accumulator_nbytes)
    assert re.search(rf"^ +gradient accumulators +{re.escape(size)}, not planned$", str(report), re.MULTILINE)


def test_a_closed_engine_holds_no_sums():
    config = auto_config()
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for num_steps in range(2):
            for batch in TOWER.batches(2):
                square(measured(engine, batch, is_first=num_steps == 0)).backward()
            optimizer.step()
        assert accumulator_nbytes(engine) > 0
    assert accumulator_nbytes(engine) == 0


# ---------------------------------------------------------------- the choice


def choose(grads: Sequence[MemoryTier | None], numels: Sequence[int], free_nbytes: int) -> list[int]:
    demands = [
        ChunkDemand(
            chunk_id=chunk_id,
            numel=numel,
            working_itemsize=2,
            master_itemsize=2,
            is_trainable=grad is not None,
            is_pinned=False,
        )
        for chunk_id, (grad, numel) in enumerate(zip(grads, numels, strict=True))
    ]
    homes = tuple(
        ChunkPlacement(chunk_id=chunk_id, working=(HOST,), state=(HOST,), grad=grad, is_resident=True)
        for chunk_id, grad in enumerate(grads)
    )
    return choose_accumulators(
        demands, PlacementPlan(chunks=homes, num_slots=0, slot_nbytes=0), free_nbytes=free_nbytes
    )


@pytest.mark.parametrize(
    ("grads", "numels", "free_nbytes", "expected"),
    [
        ([HOST, HOST, HOST], [1024, 1024, 1024], 3 * 4096, [0, 1, 2]),
        ([HOST, HOST, HOST], [1024, 1024, 1024], 3 * 4096 - 1, [0, 1]),
        ([HOST, NVME, HOST], [1024, 1024, 1024], 2 * 4096, [1, 0]),
        ([DEVICE, None, HOST], [1024, 1024, 1024], 9 * 4096, [2]),
        ([HOST, HOST], [4096, 1024], 4096, [1]),
        ([HOST], [1025], 2 * 4096 - 1, []),
        ([HOST], [1024], -4096, []),
        ([], [], 4096, []),
    ],
)
def test_sums_on_disk_come_first_and_the_rest_in_order_as_far_as_they_fit(grads, numels, free_nbytes, expected):
    assert choose(grads, numels, free_nbytes) == expected
