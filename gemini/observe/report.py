"""The engine's memory and the cost of its moves, as data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import psutil

from gemini.errors import ConfigError
from gemini.heap import HeapStatistics, statistics
from gemini.offload.io import IoStats
from gemini.placement.cost_model import HardwareProfile, StepFlops, StepPrediction, count_step, predict_step
from gemini.placement.plan import MemoryDemand
from gemini.runtime.runtime import Runtime
from gemini.tiers import MemoryTier, format_nbytes

__all__ = ["DiskWear", "MemoryReport", "TierReport", "UpdateReport", "check_prediction", "make_report", "wear_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierReport:
    """Planned and measured bytes of one tier."""

    tier: str
    budget_nbytes: int | None
    """Budget in bytes; None if the tier does not exist or has no limit."""
    planned_nbytes: dict[str, int]
    """Planned bytes by purpose, computed before anything was allocated."""
    held_nbytes: dict[str, int]
    """Allocated bytes by purpose."""
    peak_nbytes: int
    """Maximum bytes allocated at any time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskWear:
    """The share of the drive's life that training uses."""

    endurance_nbytes: int
    """Bytes that the drive is rated for, as configured."""
    life_share_per_step: float
    """Share of those bytes that one step writes."""
    num_steps_of_life: int | None
    """Number of steps that a new drive is rated for; None if a step writes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """The times at which chunks were updated."""

    overlap_asked: str
    """Mode in `GeminiConfig.overlap`."""
    overlap: str
    """Mode in force for the coming step."""
    why_not_asked: str | None
    """Reason why that is not the configured mode; None if it is, or if "auto" was configured."""
    num_updates: int
    """Number of chunks that steps have updated since construction."""
    num_ahead: int
    """Number of updates that were started ahead of the step."""
    num_redone: int
    """Number of those that had to be redone."""
    busy_s: float | None
    """Seconds of the last step in which the update thread had something to read, compute or write; None before the
    second step."""
    step_s: float | None
    """Seconds of that step, from the end of the previous step to its own end; None before the second step."""

    def __str__(self) -> str:
        why = "" if self.why_not_asked is None else f", but {self.why_not_asked}"
        text = (
            f"overlap {self.overlap} (requested: {self.overlap_asked}{why}); {self.num_updates} updates of chunks, "
            f"{self.num_ahead} started ahead of the step, {self.num_redone} of them redone"
        )
        if self.busy_s is not None and self.step_s is not None:
            text += f"; thread busy {self.busy_s:.3f} s of the last step's {self.step_s:.3f} s"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Memory and moves of one engine since it was built."""

    tiers: tuple[TierReport, ...]
    num_steps: int
    num_skipped_steps: int
    num_params: int
    """Number of elements of all parameters."""
    num_chunks: int
    num_resident_chunks: int
    num_slots: int
    slot_nbytes: int
    accumulator_nbytes: int
    """Bytes of gradient sums on the device now; included in its `held_nbytes`, but not planned."""
    num_fetches: int
    num_misses: int
    """Number of fetches that started only when the weights were needed."""
    num_trace_mismatches: int
    fetched_nbytes: int
    nvme_read_nbytes: int
    """Bytes read since construction, in completed transfers. The bytes written include the first weights and state."""
    nvme_written_nbytes: int
    nvme_read_nbytes_per_step: float | None
    """Mean since the weights were written home, including skipped steps and evaluation; None before the first step."""
    nvme_written_nbytes_per_step: float | None
    wear: DiskWear | None
    """Wear of the drive; None unless NVMeConfig.endurance is set and a step was made."""
    fetch_stall_s: float
    """Seconds that forward and backward waited for weights."""
    update_stall_s: float
    """Seconds that training waited for updates."""
    updates: UpdateReport
    non_model_peak_nbytes: int | None
    """Peak bytes of activations and temporaries; None until measured (on the CPU: inside `engine.trace_memory()`)."""
    resident_set_nbytes: int
    """Resident memory of the process now, in bytes."""
    heap: HeapStatistics | None
    """Statistics of torch's large CPU blocks; None where torch uses its own allocator, which does not count."""
    io_engine: str | None
    """I/O backend of the disk; None without a disk."""
    is_direct_io: bool | None
    instruction_set: str
    step_s: float | None
    """Median seconds of recent steps, from the start of forward to the end of the update; None before two steps."""
    predicted: StepPrediction | None
    """The cost model's prediction for the next step; None without a hardware profile."""

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        lines = [
            f"{self.num_params:,} parameters in {self.num_chunks} chunks, {self.num_resident_chunks} of them resident; "
            f"{self.num_slots} slots of {format_nbytes(self.slot_nbytes)}"
        ]
        for tier in self.tiers:
            if not tier.planned_nbytes and not tier.peak_nbytes:
                continue
            budget = "no limit" if tier.budget_nbytes is None else f"budget {format_nbytes(tier.budget_nbytes)}"
            planned = sum(tier.planned_nbytes.values())
            lines.append(
                f"{tier.tier:>7}: peak {format_nbytes(tier.peak_nbytes)}, planned {format_nbytes(planned)}, {budget}"
            )
            lines += [f"{'':9}{purpose:<24}{format_nbytes(n):>12}" for purpose, n in tier.planned_nbytes.items()]
            lines += [
                f"{'':9}{purpose:<24}{format_nbytes(n):>12}, not planned"
                for purpose, n in tier.held_nbytes.items()
                if n and purpose not in tier.planned_nbytes
            ]
        lines.append(
            f"{self.num_steps} steps ({self.num_skipped_steps} skipped): {self.num_fetches} fetches, "
            f"{self.num_misses} of them late, {format_nbytes(self.fetched_nbytes)}; stalls "
            f"{self.fetch_stall_s:.2f} s for weights, {self.update_stall_s:.2f} s in updates"
        )
        lines.append(f"updates: {self.updates}")
        if self.io_engine is not None:
            lines.append("   disk: " + self._describe_disk())
        if self.heap is not None:
            lines.append(
                f"   heap: peak {format_nbytes(self.heap.peak_resident_nbytes)} resident for "
                f"{format_nbytes(self.heap.peak_live_nbytes)} alive at once"
            )
        if self.step_s is not None:
            lines.append(f"   step: {self.step_s:.3f} s measured")
        if self.predicted is not None:
            seconds = ", ".join(f"{channel.value} {s:.3f} s" for channel, s in self.predicted.seconds.items() if s)
            lines.append(
                f"   step: {self.predicted.step_s:.3f} s predicted, overlap {self.predicted.overlap}, bottleneck "
                f"{self.predicted.bottleneck.value} ({seconds})"
            )
        return "\n".join(lines)

    def _describe_disk(self) -> str:
        text = f"read {format_nbytes(self.nvme_read_nbytes)}, written {format_nbytes(self.nvme_written_nbytes)}"
        if self.nvme_read_nbytes_per_step is not None and self.nvme_written_nbytes_per_step is not None:
            text += (
                f"; a step reads {format_nbytes(self.nvme_read_nbytes_per_step)} and writes "
                f"{format_nbytes(self.nvme_written_nbytes_per_step)}"
            )
        if self.wear is not None:
            text += f", {self.wear.life_share_per_step:.2g} of the drive's rated life"
            if self.wear.num_steps_of_life is not None:
                text += f" ({self.wear.num_steps_of_life:,} steps)"
        return text


def wear_of(endurance_nbytes: int, *, written_nbytes_per_step: float) -> DiskWear:
    """Compare what a step writes with the drive's rated endurance.

    Args:
        endurance_nbytes: bytes that the drive is rated for, more than 0.
        written_nbytes_per_step: bytes that one step writes.

    Returns:
        The share of one step, and the possible number of steps.
    """
    return DiskWear(
        endurance_nbytes=endurance_nbytes,
        life_share_per_step=written_nbytes_per_step / endurance_nbytes,
        num_steps_of_life=int(endurance_nbytes / written_nbytes_per_step) if written_nbytes_per_step else None,
    )


def check_prediction(runtime: Runtime, profile: HardwareProfile | None, flops: StepFlops | None) -> None:
    """Raise ConfigError unless `make_report` is given both of them or neither."""
    if profile is not None and not runtime.sharding.is_alone:
        raise ConfigError("GeminiDDP.memory_report: no prediction with several ranks: the network is not modelled")
    if (profile is None) is not (flops is None):
        raise ConfigError(
            "GeminiDDP.memory_report: a prediction needs both profile= (from gemini.measure_hardware) and flops= "
            "(from gemini.transformer_flops, or counted); give both or neither"
        )
    if flops is not None and not isinstance(flops, StepFlops):
        raise ConfigError(
            "GeminiDDP.memory_report: flops: expected StepFlops, such as gemini.transformer_flops returns, got "
            f"{flops!r}"
        )


def make_report(
    runtime: Runtime, profile: HardwareProfile | None, flops: StepFlops | None, *, disk_at_start: IoStats
) -> MemoryReport:
    """Build a report; cheap, moves nothing.

    Args:
        runtime: the runtime to report.
        profile: the machine's rates, for a prediction; None: no prediction.
        flops: operations of a step; given together with `profile`.
        disk_at_start: bytes that the disk had moved when the initial weights had been written.

    Returns:
        The report.
    """
    resources, core, stats = runtime.resources, runtime.core, runtime.core.stats
    store = resources.store
    disk = store.stats() if store is not None else disk_at_start
    nvme = runtime.config.nvme
    num_steps = runtime.steps.num_steps + runtime.steps.num_skipped_steps
    moved = disk - disk_at_start
    wear = None
    if num_steps and store is not None and nvme is not None and nvme.endurance_nbytes is not None:
        wear = wear_of(nvme.endurance_nbytes, written_nbytes_per_step=moved.nbytes_written / num_steps)
    return MemoryReport(
        tiers=tuple(_tier_report(runtime, runtime.demand, tier) for tier in MemoryTier),
        num_steps=runtime.steps.num_steps,
        num_skipped_steps=runtime.steps.num_skipped_steps,
        num_params=sum(place.spec.numel for place in runtime.layout.place_by_name.values()),
        num_chunks=len(core.chunks),
        num_resident_chunks=sum(chunk.is_resident for chunk in core.chunks),
        num_slots=runtime.plan.num_slots,
        slot_nbytes=runtime.plan.slot_nbytes,
        accumulator_nbytes=runtime.gradients.accumulators.nbytes,
        num_fetches=stats.num_fetches,
        num_misses=stats.num_misses,
        num_trace_mismatches=runtime.lookahead.num_mismatches,
        fetched_nbytes=stats.fetched_nbytes,
        nvme_read_nbytes=disk.nbytes_read,
        nvme_written_nbytes=disk.nbytes_written,
        nvme_read_nbytes_per_step=moved.nbytes_read / num_steps if num_steps else None,
        nvme_written_nbytes_per_step=moved.nbytes_written / num_steps if num_steps else None,
        wear=wear,
        fetch_stall_s=stats.stall_s,
        update_stall_s=runtime.updates.stall_s,
        updates=_update_report(runtime),
        non_model_peak_nbytes=runtime.probe.non_model_peak_nbytes,
        resident_set_nbytes=psutil.Process().memory_info().rss,
        heap=statistics(),
        io_engine=store.backend.name.lower() if store is not None else None,
        is_direct_io=store.is_direct if store is not None else None,
        instruction_set=resources.isa.name.lower(),
        step_s=runtime.steps.clock.step_s,
        predicted=_predict(runtime, profile, flops) if profile is not None and flops is not None else None,
    )


def _update_report(runtime: Runtime) -> UpdateReport:
    stats, overlap = runtime.updates.stats, runtime.updates.overlap
    return UpdateReport(
        overlap_asked=runtime.config.overlap,
        overlap=overlap.mode.value,
        why_not_asked=overlap.why_not_ahead,
        num_updates=stats.num_updates,
        num_ahead=stats.num_ahead,
        num_redone=stats.num_redone,
        busy_s=overlap.last_step.busy_s if overlap.last_step is not None else None,
        step_s=overlap.last_step.elapsed_s if overlap.last_step is not None else None,
    )


def _predict(runtime: Runtime, profile: HardwareProfile, flops: StepFlops) -> StepPrediction:
    """Predict how long the next step takes with the current plan; see gemini.placement.cost_model."""
    return predict_step(
        count_step(runtime.demands, runtime.plan, runtime.shape, flops),
        profile,
        dtype=str(runtime.config.dtype).removeprefix("torch."),
        mode=runtime.updates.overlap.mode,
        has_device=runtime.shape.has_device,
    )


def _tier_report(runtime: Runtime, demand: MemoryDemand, tier: MemoryTier) -> TierReport:
    ledger = runtime.resources.ledger
    if tier is MemoryTier.NVME:
        held = demand.by_purpose[tier]
        peak = runtime.resources.store.held_nbytes if runtime.resources.store is not None else 0
    else:
        held, peak = ledger.by_purpose(tier), ledger.peak_nbytes(tier)
    return TierReport(
        tier=tier.value,
        budget_nbytes=ledger.budget_nbytes(tier),
        planned_nbytes=demand.by_purpose[tier],
        held_nbytes=held,
        peak_nbytes=peak,
    )
