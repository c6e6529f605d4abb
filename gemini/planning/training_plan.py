"""Predicts what training a model on a machine needs: placement, peaks, time and wear, before any allocation.

Uses the engine's blueprint and rehearses a step; the formulas are those of gemini.placement. Must not know where models
come from or how plans are shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gemini.assembly.blueprint import Blueprint, draw_blueprint, draw_layout
from gemini.config import GeminiConfig, NVMeConfig
from gemini.errors import ConfigError, OutOfTierMemoryError
from gemini.observe.report import DiskWear, wear_of
from gemini.placement.cost_model import (
    Channel,
    HardwareProfile,
    StepPrediction,
    StepWork,
    Work,
    count_step,
    predict_step,
)
from gemini.placement.overlap import OverlapMode
from gemini.planning.rehearsal import LossFn, Rehearsal, rehearse
from gemini.runtime.adaptation import NON_MODEL_MARGIN
from gemini.tiers import MemoryTier, format_nbytes

__all__ = ["PROCESS_NBYTES", "MachineMemory", "TrainingPlan", "plan_step", "plan_training", "remedies"]

PROCESS_NBYTES = 512 << 20
"""Host memory of the interpreter, torch and transformers before a model is built."""
HEAP_SLACK = 1 / 16
"""Fraction of the activations that the CPU's heap may hold in addition, see docs/memory_model.md."""
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineMemory:
    """Bytes of a machine that training may use in total."""

    device: int | None
    """Device memory, activations included; None if forward and backward run on the processor."""
    host: int
    """Main memory, including the process itself, and activations if there is no device."""
    nvme: int | None
    """Disk space; None if there is no disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Predicted needs of training with one configuration."""

    config: GeminiConfig
    """Configuration with budgets and reserves filled in; an engine that is given it places its chunks as planned."""
    blueprint: Blueprint
    rehearsal: Rehearsal
    num_tokens: int
    """Number of tokens in a step."""
    work: StepWork
    prediction: StepPrediction | None
    """Predicted time of a step; None without a hardware profile."""

    @property
    def num_params(self) -> int:
        """Number of elements of all parameters."""
        return sum(place.spec.numel for place in self.blueprint.layout.place_by_name.values())

    def peak_by_purpose(self, tier: MemoryTier) -> dict[str, int]:
        """Return the bytes that a tier holds at its peak, largest first, without the process's own."""
        purposes = dict(self.blueprint.memory.by_purpose[tier])
        compute_tier = MemoryTier.DEVICE if self.blueprint.shape.has_device else MemoryTier.HOST
        if tier is compute_tier:
            purposes["activations"] = self.rehearsal.peak_nbytes
        if tier is MemoryTier.HOST and self.rehearsal.checkpoint_nbytes:
            purposes["activation checkpoints"] = self.rehearsal.checkpoint_nbytes
        return dict(sorted(purposes.items(), key=lambda item: -item[1]))

    def peak_nbytes(self, tier: MemoryTier) -> int:
        """Return the bytes that a tier holds at its peak."""
        return sum(self.peak_by_purpose(tier).values())

    @property
    def tokens_per_s(self) -> float | None:
        """Number of tokens per second; None without a prediction."""
        return None if self.prediction is None else self.num_tokens / self.prediction.step_s

    @property
    def compute_bound_tokens(self) -> int | None:
        """Tokens per step at which compute becomes the bottleneck, for sequences of the same length; None if unknown.

        Compute grows with the tokens, traffic does not; compute includes its passes over its own memory.
        """
        if self.prediction is None:
            return None
        seconds = self.prediction.seconds
        own = (Channel.COMPUTE, Channel.DEVICE_MEMORY if self.blueprint.shape.has_device else Channel.HOST_MEMORY)
        traffic_s = max(s for channel, s in seconds.items() if channel not in own)
        if not seconds[Channel.COMPUTE]:
            return None
        return max(1, math.ceil(self.num_tokens * traffic_s / seconds[Channel.COMPUTE]))

    @property
    def wear(self) -> DiskWear | None:
        """Share of the drive's life that a step takes; None if its endurance is not configured."""
        nvme = self.config.nvme
        if nvme is None or nvme.endurance_nbytes is None:
            return None
        return wear_of(nvme.endurance_nbytes, written_nbytes_per_step=self.work.total.nvme_written_nbytes)

    @property
    def days_of_life(self) -> float | None:
        """Days of training until the drive's rated endurance is used up; None if unknown, or if nothing is written."""
        if self.wear is None or self.wear.num_steps_of_life is None or self.prediction is None:
            return None
        return self.wear.num_steps_of_life * self.prediction.step_s / SECONDS_PER_DAY


def plan_step(
    model: torch.nn.Module,
    loss_fn: LossFn,
    config: GeminiConfig,
    *,
    num_tokens: int,
    memory: MachineMemory,
    profile: HardwareProfile | None = None,
) -> TrainingPlan:
    """Plan the training of a model; allocates nothing that grows with it if the model is on "meta".

    Args:
        model: the user's model.
        loss_fn: runs it on one batch, which is a whole step.
        config: the engine's configuration; device and budgets are taken from `memory`.
        num_tokens: number of tokens in the batch, for rates.
        memory: memory of the machine to plan for.
        profile: the machine's rates, for the time of a step; None: no time.

    Returns:
        The plan.

    Raises:
        ConfigError: the configuration contradicts itself, or the profile lacks a rate.
        ModelError: the model cannot be placed or rehearsed.
        OutOfTierMemoryError: the machine cannot hold the training; says what would help.
    """
    rehearsal = rehearse(model, loss_fn, config, draw_layout(model, config), has_device=memory.device is not None)
    return plan_training(model, config, rehearsal, num_tokens=num_tokens, memory=memory, profile=profile)


def plan_training(
    model: torch.nn.Module,
    config: GeminiConfig,
    rehearsal: Rehearsal,
    *,
    num_tokens: int,
    memory: MachineMemory,
    profile: HardwareProfile | None = None,
) -> TrainingPlan:
    """Plan with an earlier rehearsal, for example for other budgets; see `plan_step`.

    Args:
        model: the user's model.
        config: the engine's configuration.
        rehearsal: the rehearsal of this model with this configuration.
        num_tokens: number of tokens in the rehearsed batch.
        memory: memory of the machine to plan for.
        profile: the machine's rates; None: no time.

    Returns:
        The plan.

    Raises:
        ConfigError: the configuration contradicts itself, or the profile lacks a rate.
        ModelError: the model cannot be placed.
        OutOfTierMemoryError: the machine cannot hold the training; says what would help.
    """
    config = _with_budgets(config, rehearsal, memory)
    budgets = {
        MemoryTier.DEVICE: memory.device,
        MemoryTier.HOST: _nbytes(config.host_budget),
        MemoryTier.NVME: memory.nvme,
    }
    blueprint = draw_blueprint(model, config, budgets=budgets)
    work = count_step(blueprint.demands, blueprint.plan, blueprint.shape, rehearsal.work)
    return TrainingPlan(
        config=config,
        blueprint=blueprint,
        rehearsal=rehearsal,
        num_tokens=num_tokens,
        work=work,
        prediction=None if profile is None else _predict(config, blueprint, work, profile),
    )


def _nbytes(budget: str | int | None) -> int:
    assert isinstance(budget, int)
    return budget


def _with_budgets(config: GeminiConfig, rehearsal: Rehearsal, memory: MachineMemory) -> GeminiConfig:
    """Return the configuration for a machine with the rehearsal's needs reserved, or raise OutOfTierMemoryError."""
    has_device = memory.device is not None
    activations_nbytes = int(rehearsal.peak_nbytes * NON_MODEL_MARGIN)
    host_nbytes = memory.host - PROCESS_NBYTES
    if has_device:
        _check_room(MemoryTier.DEVICE, memory.device, activations_nbytes)
    else:
        host_nbytes -= int(rehearsal.peak_nbytes * (1 + HEAP_SLACK))
        _check_room(MemoryTier.HOST, memory.host, memory.host - host_nbytes)
    _check_room(MemoryTier.HOST, host_nbytes, rehearsal.checkpoint_nbytes)
    nvme = config.nvme
    if memory.nvme is None:
        nvme = None
    elif nvme is None:
        nvme = NVMeConfig(path=".", budget=memory.nvme)
    else:
        nvme = dataclasses.replace(nvme, budget=memory.nvme)
    return dataclasses.replace(
        config,
        device=config.device or ("cuda" if has_device else "cpu"),
        device_budget=memory.device,
        host_budget=host_nbytes,
        nvme=nvme,
        activation_reserve=activations_nbytes if has_device else None,
        checkpoint_reserve=rehearsal.checkpoint_nbytes or None,
    )


def _check_room(tier: MemoryTier, nbytes: int | None, needed_nbytes: int) -> None:
    if nbytes is None or needed_nbytes < nbytes:
        return
    raise OutOfTierMemoryError(
        f"{tier.value} tier is short by {needed_nbytes - nbytes} bytes before any chunk is placed: activations and the "
        f"process take {format_nbytes(needed_nbytes)} of {format_nbytes(nbytes)}; use activation checkpointing, slices "
        "(num_batch_slices), the sliced loss, or fewer or shorter sequences in a batch"
    )


def _predict(config: GeminiConfig, blueprint: Blueprint, work: StepWork, profile: HardwareProfile) -> StepPrediction:
    """Predict a step in the overlap that the engine chooses; for "auto", in the fastest one."""
    has_device = blueprint.shape.has_device
    dtype = str(config.dtype).removeprefix("torch.")

    def predict(mode: OverlapMode) -> StepPrediction:
        return predict_step(work, profile, dtype=dtype, mode=mode, has_device=has_device)

    return min(map(predict, _modes(config, blueprint, work)), key=lambda prediction: prediction.step_s)


def _modes(config: GeminiConfig, blueprint: Blueprint, work: StepWork) -> Iterator[OverlapMode]:
    """Yield the possible overlaps, the simplest first; at least one."""
    can_run_ahead = blueprint.shape.has_spares and work.ahead != Work()
    if config.overlap == "auto":
        has_traffic = blueprint.shape.has_device or work.update.nvme_written_nbytes > 0
        yield OverlapMode.NEXT_FORWARD if has_traffic else OverlapMode.OFF
        if can_run_ahead:
            yield OverlapMode.SPECULATIVE
    elif config.overlap == "speculative" and not can_run_ahead:
        yield OverlapMode.NEXT_FORWARD
    else:
        yield OverlapMode(config.overlap)


def remedies(model: torch.nn.Module, config: GeminiConfig, rehearsal: Rehearsal, *, memory: MachineMemory) -> list[str]:
    """Find single changes that would make a training fit; each of them has been planned.

    Args:
        model: the user's model.
        config: as for `plan_training`, which has raised OutOfTierMemoryError.
        rehearsal: the rehearsal of this model with this configuration.
        memory: the machine's memory.

    Returns:
        Descriptions of the changes; empty if no single change is enough.
    """
    unlimited = 1 << 60

    def plan(config: GeminiConfig = config, memory: MachineMemory = memory) -> TrainingPlan | None:
        try:
            return plan_training(model, config, rehearsal, num_tokens=1, memory=memory)
        except (OutOfTierMemoryError, ConfigError):
            return None

    found: list[str] = []
    if config.gradient_accumulation and plan(dataclasses.replace(config, gradient_accumulation=False)):
        found.append("keep gradients in the working dtype (--no-accumulation)")
    with_disk = plan(memory=dataclasses.replace(memory, nvme=unlimited))
    if with_disk is not None:
        nbytes = with_disk.peak_nbytes(MemoryTier.NVME)
        found.append(f"use {format_nbytes(nbytes)} of disk (--disk)")
    for name, option in (("host", "--host-memory"), ("device", "--device-memory")):
        held = getattr(memory, name)

        def fits(nbytes: int, name: str = name) -> bool:
            return plan(memory=dataclasses.replace(memory, **{name: nbytes})) is not None

        if held is not None and fits(unlimited):
            found.append(f"use {format_nbytes(_least(held, fits))} of {name} memory ({option})")
    return found


def _least(too_few: int, fits: Callable[[int], bool]) -> int:
    """Return a number of bytes that fits, a little above the lowest; `too_few` does not fit, `enough` does."""
    step = max(64 << 20, too_few // 32)
    low, high = too_few // step, 2 * (too_few // step) + 1
    while not fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * step) else (middle, high)
    return high * step
