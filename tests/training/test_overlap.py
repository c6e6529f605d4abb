"""Updates behind the next forward and ahead of the step change no bit, whatever happens between backward and step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import HF_CASES
from training_harness import Case, Run, config_for, hybrid_adam, same_bits

from gemini import GeminiDDP, HybridAdam
from gemini.placement.overlap import OverlapMode, choose_overlap, smoothed_rate
from gemini.tiers import MemoryTier

MODES = ("next-forward", "speculative")
NUM_STEPS = 6
Script = Callable[[GeminiDDP, HybridAdam, Case, list[dict[str, Any]]], list[float]]


def one_step(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batch: dict[str, Any]) -> float:
    loss = case.loss(engine(**batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def plainly(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]) -> list[float]:
    return [one_step(engine, optimizer, case, batch) for batch in batches]


def with_a_schedule(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]) -> list[float]:
    """The learning rate changes after each step, and in one step between backward and step."""
    losses = []
    for index, batch in enumerate(batches):
        loss = case.loss(engine(**batch))
        loss.backward()
        if index == 4:
            optimizer.param_groups[0]["lr"] *= 0.25
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
        losses.append(loss.item())
    return losses


def evaluating_before_the_step(
    engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]
) -> list[float]:
    """An evaluation between backward and step leaves fetches under way that nobody will use."""
    losses = []
    for batch in batches:
        loss = case.loss(engine(**batch))
        loss.backward()
        with torch.no_grad():
            engine(**batch)
        optimizer.step()
        losses.append(loss.item())
    return losses


def dropping_gradients(
    engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]
) -> list[float]:
    """After each step comes a backward whose gradients are thrown away."""
    losses = []
    for batch in batches:
        losses.append(one_step(engine, optimizer, case, batch))
        case.loss(engine(**batch)).backward()
        optimizer.zero_grad()
    return losses


def accumulating(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]) -> list[float]:
    """One, two or three backward passes come before a step, so that what the last step did says little."""
    losses = []
    for index in range(NUM_STEPS):
        for batch in batches[: 1 + index % 3]:
            loss = case.loss(engine(**batch))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def looking(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]) -> list[float]:
    """Weights and state are read, and the model evaluated, between forward, backward, step and the next forward."""
    losses: list[float] = []

    def look() -> None:
        weights, state = engine.master_state_dict(), optimizer.state_dict()["state"]
        losses.extend(float(tensor.double().sum()) for tensor in weights.values())
        losses.extend(float(entry["exp_avg"].double().sum()) for entry in state.values())
        with torch.no_grad():
            losses.append(case.loss(engine(**batches[0])).item())

    for batch in batches:
        loss = case.loss(engine(**batch))
        loss.backward()
        look()
        optimizer.step()
        look()
        losses.append(loss.item())
    return losses


def clipping_by_hand(
    engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]
) -> list[float]:
    losses = []
    for index, batch in enumerate(batches):
        loss = case.loss(engine(**batch))
        loss.backward()
        if index % 2:
            engine.clip_grad_norm_(1e-3)
        optimizer.step()
        losses.append(loss.item())
    return losses


def clipping_now_and_then(
    engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]
) -> list[float]:
    losses = []
    for index, batch in enumerate(batches):
        optimizer.max_grad_norm = 1e-3 if index in (2, 5) else 1e6
        losses.append(one_step(engine, optimizer, case, batch))
    return losses


def skipping(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]) -> list[float]:
    """Every other step has a gradient that is not finite, in the parameter whose gradient comes last."""
    losses = []
    poisoned = next(engine.module.parameters())
    for index, batch in enumerate(batches):
        handle = poisoned.register_hook(lambda grad: grad * math.nan) if index % 2 else None
        losses.append(one_step(engine, optimizer, case, batch))
        if handle is not None:
            handle.remove()
    assert optimizer.runtime.steps.num_skipped_steps == NUM_STEPS // 2
    return losses


def loading(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]) -> list[float]:
    """Weights and state are replaced between backward and step, and between step and forward."""
    losses = []
    weights, state = engine.master_state_dict(), optimizer.state_dict()
    for index, batch in enumerate(batches):
        loss = case.loss(engine(**batch))
        loss.backward()
        if index == 3:
            engine.load_state_dict(weights)
        optimizer.step()
        if index == 4:
            optimizer.load_state_dict(state)
        losses.append(loss.item())
    return losses


def failing(engine: GeminiDDP, optimizer: HybridAdam, case: Case, batches: list[dict[str, Any]]) -> list[float]:
    """Backward fails half way in every other step and is taken again."""
    losses = []
    first = next(engine.module.parameters())

    def fail(grad: torch.Tensor) -> None:
        raise RuntimeError("half way")

    for index, batch in enumerate(batches):
        if index % 2:
            handle = first.register_hook(fail)
            with pytest.raises(RuntimeError, match="half way"):
                case.loss(engine(**batch)).backward()
            handle.remove()
            optimizer.zero_grad()
        losses.append(one_step(engine, optimizer, case, batch))
    return losses


SCRIPTS: dict[str, tuple[Script, float | None]] = {
    "plain": (plainly, None),
    "clip idle": (plainly, 1e6),
    "clip active": (plainly, 1e-3),
    "clip now and then": (clipping_now_and_then, 1e6),
    "clip by hand": (clipping_by_hand, None),
    "schedule": (with_a_schedule, 1e6),
    "dropped gradients": (dropping_gradients, 1e6),
    "accumulation": (accumulating, 1e6),
    "reading": (looking, 1e6),
    "skipped steps": (skipping, None),
    "loading": (loading, None),
    "failing backward": (failing, 1e6),
}


def train(
    overlap: str, place: str, tmp_path: Path, script: Script, max_norm: float | None, **fields: Any
) -> tuple[Run, GeminiDDP]:
    case = HF_CASES["gpt2"]
    with GeminiDDP(case.model(), config_for(place, tmp_path, overlap=overlap, **fields)) as engine:
        optimizer = hybrid_adam(engine.parameters(), max_grad_norm=max_norm)
        torch.manual_seed(2)
        losses = script(engine, optimizer, case, case.batches(NUM_STEPS))
        return Run(losses, engine.master_state_dict()), engine


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_ends_fetches_that_nobody_will_use(tmp_path: Path, depth: int) -> None:
    expected, _ = train("off", "host", tmp_path, evaluating_before_the_step, None)
    found, _ = train("next-forward", "device", tmp_path, evaluating_before_the_step, None, prefetch_depth=depth)
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)


@pytest.mark.quick_cases(15)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("place", ["nvme", "mixed", "below"])
def test_no_mode_changes_a_bit(tmp_path: Path, place: str, name: str, mode: str) -> None:
    script, max_norm = SCRIPTS[name]
    expected, _ = train("off", place, tmp_path, script, max_norm)
    found, engine = train(mode, place, tmp_path, script, max_norm)
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)
    stats = engine.runtime.updates.stats
    if mode == "next-forward":
        assert stats.num_ahead == 0
    elif name in ("plain", "clip idle"):
        assert stats.num_ahead > 0
        assert stats.num_redone == 0
    elif name in ("clip now and then", "schedule", "dropped gradients", "loading", "failing backward"):
        assert stats.num_redone > 0


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("place", ["host", "device", "resident"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_without_a_disk_change_no_bit(tmp_path: Path, place: str, mode: str) -> None:
    expected, _ = train("off", place, tmp_path, looking, 0.8)
    found, _ = train(mode, place, tmp_path, looking, 0.8)
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulation", [False, True])
def test_half_precision_changes_no_bit(tmp_path: Path, dtype: torch.dtype, accumulation: bool) -> None:
    runs = [
        train(mode, "nvme", tmp_path, plainly, 0.8, dtype=dtype, gradient_accumulation=accumulation)[0]
        for mode in ("off", *MODES)
    ]
    for run in runs[1:]:
        assert run.losses == runs[0].losses
        assert same_bits(run.weights, runs[0].weights)


def test_updates_of_state_in_host_memory_and_of_residents_come_before_the_step(tmp_path: Path) -> None:
    """Half of what is in host memory has second places there; copies on the device are refreshed at the step."""
    _, engine = train("speculative", "below", tmp_path, plainly, None)
    stats = engine.runtime.updates.stats
    chunks = [chunk for chunk in engine.runtime.plan.chunks if chunk.spares]
    assert {chunk.is_resident for chunk in chunks} == {True, False}
    kinds = {(chunk.state[tile], chunk.working[tile]) for chunk in chunks for tile in chunk.spares}
    assert kinds == {(MemoryTier.NVME, MemoryTier.HOST), (MemoryTier.HOST, MemoryTier.HOST)}
    assert stats.num_ahead == (NUM_STEPS - 1) * len(chunks)
    assert stats.num_redone == 0


def test_most_updates_of_a_speculating_engine_come_before_the_step(tmp_path: Path) -> None:
    """Every chunk whose gradients are all there is updated ahead, from the second step on."""
    _, engine = train("speculative", "nvme", tmp_path, plainly, None)
    stats = engine.runtime.updates.stats
    on_disk = [state for state in engine.runtime.states.values() if state.has_spare(0)]
    assert stats.num_ahead == (NUM_STEPS - 1) * len(on_disk)


def test_clipping_all_the_time_ends_speculation(tmp_path: Path) -> None:
    _, engine = train("speculative", "nvme", tmp_path, plainly, 1e-3)
    assert engine.runtime.updates.stats.num_ahead == 0


def test_a_mode_is_chosen_by_what_there_is_to_hide() -> None:
    def choose(asked: OverlapMode | None = None, **fields: Any) -> OverlapMode:
        facts: dict[str, Any] = {
            "has_traffic": True,
            "has_spares": True,
            "clip_rate": 0.0,
            "is_speculating": False,
            "stall_s": 0.1,
            "step_s": 1.0,
        }
        return choose_overlap(asked, **{**facts, **fields})

    assert choose() is OverlapMode.SPECULATIVE
    assert choose(has_traffic=False) is OverlapMode.OFF
    assert choose(has_spares=False) is OverlapMode.NEXT_FORWARD
    assert choose(stall_s=0.001) is OverlapMode.NEXT_FORWARD
    assert choose(stall_s=0.001, is_speculating=True) is OverlapMode.SPECULATIVE
    assert choose(stall_s=None, step_s=None) is OverlapMode.NEXT_FORWARD
    assert choose(clip_rate=0.6) is OverlapMode.NEXT_FORWARD
    assert choose(clip_rate=None) is OverlapMode.NEXT_FORWARD
    assert choose(OverlapMode.OFF) is OverlapMode.OFF
    assert choose(OverlapMode.SPECULATIVE, stall_s=0.0) is OverlapMode.SPECULATIVE
    assert choose(OverlapMode.SPECULATIVE, clip_rate=0.6) is OverlapMode.NEXT_FORWARD
    assert choose(OverlapMode.NEXT_FORWARD) is OverlapMode.NEXT_FORWARD


def test_a_rate_forgets() -> None:
    rate = smoothed_rate(None, True)
    assert rate == 1.0
    for _ in range(3):
        rate = smoothed_rate(rate, False)
    assert rate < 0.5
    assert smoothed_rate(0.0, True) < 0.5
