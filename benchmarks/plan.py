"""What `python -m gemini plan` says of a training run beside what it takes: the peak of each tier, and a step's time.

GPT-2 shapes train in float32 with activation checkpointing: all in host memory, then weights and state on disk. The
machine is measured first, as `python -m gemini bench` does, and every run is planned before it is made. Errors are
planned / measured - 1; `matrix_error` is that of the same prediction with matrix products alone. Peaks are the bytes
that the engine holds and, in host memory, activations, which are counted in a step that is not timed.

    python benchmarks/plan.py [--models gpt2 gpt2-medium ...] [--swap DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from prediction import DISK_SECONDS, NUM_WARM_UPS, batches, config_for, time_step
from results_file import spread_of, write_results
from step_systems import SHAPES, build_model

from gemini import GeminiDDP, HybridAdam
from gemini.placement.cost_model import StepFlops
from gemini.planning.hardware import HardwareProfile, measure_hardware
from gemini.planning.training_plan import MachineMemory, TrainingPlan, plan_step, plan_training
from gemini.tiers import MemoryTier

COLUMNS = (
    "model",
    "system",
    "overlap",
    "step_s",
    "planned_s",
    "error",
    "matrix_error",
    "bottleneck",
    "host_peak_bytes",
    "host_error",
    "nvme_peak_bytes",
    "nvme_error",
)
RUNS = (("host", "off"), ("nvme", "next-forward"), ("nvme", "speculative"))
MEMORY = {
    "host": MachineMemory(device=None, host=22 << 30, nvme=None),
    "nvme": MachineMemory(device=None, host=22 << 30, nvme=64 << 30),
}


def draw(
    model: str, place: str, overlap: str, options: argparse.Namespace, profile: HardwareProfile, swap: str
) -> tuple[TrainingPlan, float]:
    """Return the plan, and the seconds it would have with matrix products alone."""
    built = build_model(model, options.seq, "meta")

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        batch = torch.zeros(options.batch, options.seq, dtype=torch.int64)
        loss: torch.Tensor = model(input_ids=batch, labels=batch).loss
        return loss

    num_tokens = options.batch * options.seq
    config = config_for(place, overlap, swap)
    plan = plan_step(built, loss_of, config, num_tokens=num_tokens, memory=MEMORY[place], profile=profile)
    work = plan.rehearsal.work
    bare = dataclasses.replace(plan.rehearsal, work=StepFlops(forward=work.forward, backward=work.backward))
    other = plan_training(built, config, bare, num_tokens=num_tokens, memory=MEMORY[place], profile=profile)
    assert other.prediction is not None
    return plan, other.prediction.step_s


def measure(
    model: str, place: str, overlap: str, options: argparse.Namespace, profile: HardwareProfile, swap: str
) -> dict[str, Any]:
    """Plan, train, and return both."""
    plan, matrix_s = draw(model, place, overlap, options, profile, swap)
    prediction = plan.prediction
    assert prediction is not None
    torch.manual_seed(0)
    feed = batches(SHAPES[model].get("vocab_size", 50257), options.batch, options.seq)
    with GeminiDDP(build_model(model, options.seq, "cpu"), plan.config) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-5)
        times = [time_step(engine, optimizer, next(feed)) for _ in range(NUM_WARM_UPS + options.steps)]
        seconds = times[NUM_WARM_UPS:]
        with engine.trace_memory():
            time_step(engine, optimizer, next(feed))
        report = engine.memory_report()
    row: dict[str, Any] = {"model": model, "system": f"gemini {place}", "overlap": overlap, "params": report.num_params}
    row |= spread_of(seconds, "step_s") | {"planned_s": prediction.step_s, "bottleneck": prediction.bottleneck.value}
    row |= {"error": prediction.step_s / row["step_s"] - 1, "matrix_error": matrix_s / row["step_s"] - 1}
    row |= {f"{channel.name.lower()}_s": s for channel, s in prediction.seconds.items()}
    peaks = {entry.tier: entry.peak_nbytes for entry in report.tiers}
    peaks["host"] += report.non_model_peak_nbytes or 0
    for tier in (MemoryTier.HOST, MemoryTier.NVME):
        planned, measured = plan.peak_nbytes(tier), peaks[tier.value]
        row |= {f"{tier.value}_peak_bytes": measured, f"{tier.value}_planned_bytes": planned}
        row |= {f"{tier.value}_error": planned / measured - 1} if measured else {}
    return row


def main() -> None:
    """Measure the machine, then each model in each place and overlap."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=["gpt2"])
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step")
    parser.add_argument("--seq", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--swap", type=Path, help="directory on the drive to use (a temporary one here)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.swap or Path.cwd(), prefix="plan-swap-") as swap:
        profile = measure_hardware(swap, "cpu", seconds=1.0, disk_seconds=DISK_SECONDS)
        rows = [measure(model, *run, options, profile, swap) for model in options.models for run in RUNS]
    settings = {name: getattr(options, name) for name in ("models", "batch", "seq", "steps")}
    write_results(options.json, rows, COLUMNS, settings=settings, profile=dataclasses.asdict(profile))


if __name__ == "__main__":
    main()
