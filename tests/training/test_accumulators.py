"""Where the device has room, gradients of several backward passes leave it once, with the bits they always had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import HF_CASES, HIDDEN, Block, Tower, square, vector_batch
from torch import nn
from training_harness import Case, config_for, distance, hybrid_adam, plain_adamw, same_bits

from gemini import GeminiDDP
from gemini.assembly import draw_blueprint
from gemini.offload.transfer import SimulatedTransfers
from gemini.placement.accumulators import choose_accumulators
from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan
from gemini.tiers import MemoryTier

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


def auto_config(tmp_path: Path | None = None, **fields: Any) -> Any:
    """Return a configuration for which there is little room on the device until the first step has been measured."""
    place = "mixed" if tmp_path is not None else "device"
    sizes = {"device_budget": "1MiB", "activation_reserve": 750 * KIB}
    return config_for(place, tmp_path, **{"placement": "auto", **sizes, **fields})


def accumulator_nbytes(engine: GeminiDDP) -> int:
    return engine.runtime.resources.ledger.by_purpose(DEVICE).get("gradient accumulators", 0)


def train(
    case: Case, config: Any, num_passes: Sequence[int] = (2, 3, 3, 1, 4, 2), **optimizer_fields: Any
) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Train steps of so many backward passes each; return losses, weights, and the accumulators' bytes at each step."""
    batches = iter(case.batches(sum(num_passes)))
    losses, nbytes = [], []
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters(), **optimizer_fields)
        for num_steps, passes in enumerate(num_passes):
            for _ in range(passes):
                loss = case.loss(measured(engine, next(batches), is_first=num_steps == 0)) / passes
                loss.backward()
                losses.append(loss.item())
            nbytes.append(accumulator_nbytes(engine))
            optimizer.step()
            optimizer.zero_grad()
        return losses, engine.master_state_dict(), nbytes


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
    assert found[2][0] == 0
    assert min(found[2][1:]) > 0
    assert set(expected[2]) == {0}
    assert found[0] == expected[0]
    assert same_bits(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_on_the_device_change_no_bit(dtype):
    assert_same_bits(LLAMA, auto_config(dtype=dtype), dtype)


def test_parameters_that_some_passes_leave_unused_change_no_bit():
    assert_same_bits(SKIPPING, auto_config(activation_reserve=880 * KIB))


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


@pytest.mark.parametrize("host_kib", [None, 380])
def test_nobody_reads_sums_or_adds_to_them_before_they_have_left(host_kib, tmp_path, monkeypatch):
    monkeypatch.setattr(SimulatedTransfers, "download", lambda self, dst, src: LateMove(dst, src))
    sizes = {"host_budget": host_kib * KIB, "ring_depth": 2} if host_kib else {}
    assert_same_bits(LLAMA, auto_config(tmp_path if host_kib else None, **sizes))


@pytest.mark.parametrize("host_kib", [430, 600])
@pytest.mark.parametrize("overlap", ["off", "next-forward", "speculative"])
def test_overlapped_updates_change_no_bit(overlap, host_kib, tmp_path):
    found = train(LLAMA, auto_config(tmp_path, overlap=overlap, host_budget=host_kib * KIB, ring_depth=2))
    expected = train(LLAMA, config_for("host", overlap="off"))
    assert min(found[2][1:]) > 0
    assert found[0] == expected[0]
    assert same_bits(found[1], expected[1])


def test_gradients_dropped_between_passes_leave_nothing_in_the_sums():
    def loop(model: Any, optimizer: torch.optim.Optimizer, traced: bool) -> None:
        for num_steps, batch in enumerate(TOWER.batches(4)):
            for _ in range(2):
                (square(measured(model, batch, is_first=num_steps == 0) if traced else model(**batch))).backward()
            if num_steps == 2:
                optimizer.zero_grad()
                square(model(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    plain = TOWER.model()
    loop(plain, plain_adamw(plain.parameters()), traced=False)
    with GeminiDDP(TOWER.model(), auto_config()) as engine:
        loop(engine, hybrid_adam(engine.parameters()), traced=True)
        assert accumulator_nbytes(engine) > 0
        assert distance(engine.master_state_dict(), plain.state_dict()) < 1e-6


# ---------------------------------------------------------------- traffic and memory


def downloaded_nbytes(config: Any, num_passes: int) -> list[int]:
    """Return the bytes that leave the device during the backward passes of each of four steps."""
    batches = iter(TOWER.batches(4 * num_passes))
    moved: list[int] = []
    with GeminiDDP(TOWER.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        transfers = engine.runtime.resources.transfers
        download = transfers.download

        def counting(dst: torch.Tensor, src: torch.Tensor) -> Any:
            moved[-1] += src.nbytes
            return download(dst, src)

        transfers.download = counting  # type: ignore[method-assign]
        for num_steps in range(4):
            moved.append(0)
            for _ in range(num_passes):
                square(measured(engine, next(batches), is_first=num_steps == 0)).backward()
            before = moved[-1]
            optimizer.step()
            assert moved[-1] == before  # all had left when backward ended
    return moved


@pytest.mark.parametrize("num_passes", [2, 4, 8])
def test_gradients_leave_once_however_many_passes_there_are(num_passes):
    (once, *_) = downloaded_nbytes(auto_config(), 1)
    first, *others = downloaded_nbytes(auto_config(), num_passes)
    assert first == num_passes * once
    assert others == [once] * 3


def test_one_pass_a_step_takes_no_room_for_sums():
    assert train(TOWER, auto_config(), num_passes=(1, 1, 1))[2] == [0, 0, 0]


def test_a_plan_given_by_the_user_gets_no_sums():
    assert train(TOWER, config_for("device"), num_passes=(2, 2, 2))[2] == [0, 0, 0]


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
def test_the_device_budget_is_kept(device_kib):
    config = auto_config(device_budget=device_kib * KIB, activation_reserve=200 * KIB)
    with GeminiDDP(nn.Sequential(*(Block() for _ in range(6))), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for num_steps in range(3):
            for _ in range(2):
                batch = {"input": torch.randn(2, 16, HIDDEN)}
                square(measured(engine, batch, is_first=num_steps == 0)).backward()
            optimizer.step()
        peak = engine.memory_report().non_model_peak_nbytes
        ledger = engine.runtime.resources.ledger
        assert ledger.peak_nbytes(DEVICE) + peak <= device_kib * KIB


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
