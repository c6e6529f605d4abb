"""Numbers over time: memory over the moments of a step, and loss, rate and waits over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemini.profile.description import TierDescription
from gemini.profile.events import MemorySample, Step
from gemini.profile.intervals import overlap_ns, total_ns
from gemini.profile.lanes import Bar, busy_s_by_lane
from gemini.profile.recording import Recording

__all__ = ["RunSeries", "TierSeries", "measured_channels", "memory_of_step", "run_series"]

NON_MODEL_PURPOSES = frozenset({"activation checkpoints"})
"""Purposes in the ledger that are not model data; all others are model data and its buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSeries:
    """One tier's bytes, each value from a given time on."""

    tier: TierDescription
    times_ns: tuple[int, ...]
    model_nbytes: dict[str, tuple[int, ...]]
    """Bytes by purpose: weights, gradients, state, and the buffers they pass through."""
    non_model_nbytes: tuple[int | None, ...]
    """Bytes of activations and temporaries; None where they are not counted."""


def memory_of_step(recording: Recording, step: Step) -> list[TierSeries]:
    """Return what each tier held in a step; tiers that held nothing are left out.

    Args:
        recording: the rank's recording.
        step: a step with details.

    Returns:
        Step functions: each value holds until the next time; the last time is the step's end.
    """
    found = []
    for tier in recording.run.tiers:
        samples = [sample for sample in recording.samples if sample.tier == tier.tier and sample.at_ns <= step.end_ns]
        before = [sample for sample in samples if sample.at_ns < step.begin_ns][-1:]
        samples = [*before, *(sample for sample in samples if sample.at_ns >= step.begin_ns)]
        if samples:
            samples.append(samples[-1]._replace(at_ns=step.end_ns))  # the last values hold to the end
            found.append(_tier_series(tier, samples, step.begin_ns))
    return found


def _tier_series(tier: TierDescription, samples: list[MemorySample], begin_ns: int) -> TierSeries:
    purposes = dict.fromkeys(purpose for sample in samples for purpose in sample.held_nbytes)
    return TierSeries(
        tier=tier,
        times_ns=tuple(max(sample.at_ns, begin_ns) for sample in samples),
        model_nbytes={
            purpose: tuple(sample.held_nbytes.get(purpose, 0) for sample in samples)
            for purpose in purposes
            if purpose not in NON_MODEL_PURPOSES
        },
        non_model_nbytes=tuple(map(_non_model_nbytes, samples)),
    )


def _non_model_nbytes(sample: MemorySample) -> int | None:
    counted = [sample.held_nbytes[purpose] for purpose in NON_MODEL_PURPOSES if purpose in sample.held_nbytes]
    if sample.other_nbytes is None and not counted:
        return None
    return (sample.other_nbytes or 0) + sum(counted)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeries:
    """One value per step; None where none was reported."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    """Seconds from the start of forward to the end of the optimizer's step."""
    weights_stall_s: tuple[float, ...]
    update_stall_s: tuple[float, ...]
    loss: tuple[float | None, ...]
    tokens_per_s: tuple[float | None, ...]
    """Tokens per second, over all the time since the previous step."""


def run_series(recording: Recording) -> RunSeries:
    """Return what each step of a recording cost and gave."""
    steps = recording.steps
    begins_ns = [step.begin_ns for step in steps[:1]] + [step.end_ns for step in steps[:-1]]
    logged = [recording.logged.get(step.number, {}) for step in steps]
    tokens = [_finite(values.get("tokens")) for values in logged]
    elapsed_s = [(step.end_ns - begin_ns) / 1e9 for step, begin_ns in zip(steps, begins_ns, strict=True)]
    return RunSeries(
        steps=tuple(step.number for step in steps),
        seconds=tuple((step.end_ns - step.begin_ns) / 1e9 for step in steps),
        weights_stall_s=tuple(step.weights_stall_s for step in steps),
        update_stall_s=tuple(step.update_stall_s for step in steps),
        loss=tuple(_finite(values.get("loss")) for values in logged),
        tokens_per_s=tuple(
            None if count is None or not seconds else count / seconds
            for count, seconds in zip(tokens, elapsed_s, strict=True)
        ),
    )


def _finite(value: float | None) -> float | None:
    """Return a number that can be drawn, because JSON has no infinite ones; else None."""
    return value if value is not None and math.isfinite(value) else None


def measured_channels(bars: list[Bar]) -> dict[str, float]:
    """Return each channel's busy seconds in a step, as far as they are recorded; channels are those of the cost model.

    Args:
        bars: the step's bars.

    Returns:
        Seconds by name of gemini.placement.cost_model.Channel. Waits are not compute. A device's work in its own memory
        is part of its compute.
    """
    busy = busy_s_by_lane(bars)
    waits = [bar.interval for bar in bars if bar.lane == "waits"]
    passes = [bar.interval for bar in bars if bar.lane == "compute" and bar.label != "optimizer step"]
    disk = total_ns(bar.interval for bar in bars if bar.lane.startswith("NVMe")) / 1e9
    host = total_ns(bar.interval for bar in bars if bar.lane in ("optimizer", "host memory")) / 1e9
    return {
        "compute": (total_ns(passes) - overlap_ns(passes, waits)) / 1e9,
        "h2d": busy["host to device"],
        "d2h": busy["device to host"],
        "host memory": host,
        "nvme": disk,
    }
