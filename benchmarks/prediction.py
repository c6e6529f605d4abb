"""The cost model's prediction of a training step beside the step that is measured, for each placement and overlap.

A GPT-2 shape trains in float32 with activation checkpointing: all in host memory, then weights and state on disk.
The profile is measured first, so that what is compared is a prediction; the disk is measured again at the end, because
drives drift. `error` is predicted / measured - 1. The operations of the formula are given beside those that torch's
counter sees in a step of the plain model.

    python benchmarks/prediction.py [--model gpt2 | gpt2-medium | gpt2-large | tiny] [--swap DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results_file import spread_of, write_results
from step_systems import SHAPES, build_model
from torch.utils.flop_counter import FlopCounterMode

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement, StepFlops, transformer_flops
from gemini.planning.hardware import HardwareProfile, measure_hardware

COLUMNS = (
    "system",
    "overlap",
    "step_s",
    "step_s_min",
    "step_s_max",
    "predicted_s",
    "error",
    "bottleneck",
    "compute_s",
    "host_memory_s",
    "nvme_s",
)
RUNS = (
    ("host", "off"),
    ("host", "next-forward"),
    ("nvme", "off"),
    ("nvme", "next-forward"),
    ("nvme", "speculative"),
)
NUM_WARM_UPS = 3
DISK_SECONDS = 3.0


def flops_of(model: torch.nn.Module, shape: dict[str, int], batch: int, seq: int) -> StepFlops:
    """Return a GPT-2's operations in a step.

    All matrices count but the table of positions, which is looked up. Recomputation stops once it has what backward
    needs, and so before the last matrix of a block.
    """
    in_blocks = sum(param.numel() for block in model.transformer.h for param in block.parameters())
    num_recomputed = in_blocks - sum(block.mlp.c_proj.weight.numel() for block in model.transformer.h)
    return transformer_flops(
        num_params=in_blocks + model.transformer.wte.weight.numel(),
        num_tokens=batch * seq,
        num_layers=shape["n_layer"],
        hidden_size=shape["n_embd"],
        sequence_length=seq,
        num_recomputed_params=num_recomputed,
    )


def counted_flops(options: argparse.Namespace) -> float:
    """Return the operations that torch sees in forward and backward of the plain model.

    Attention is computed step by step: the counter does not know the processor's kernel that does it in one.
    """
    model = build_model(options.model, options.seq, "cpu")
    model.set_attn_implementation("eager")
    batch = torch.zeros(options.batch, options.seq, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=batch, labels=batch).loss.backward()
    return float(counter.get_total_flops())


def config_for(place: str, overlap: str, swap: str) -> GeminiConfig:
    """Return a configuration with everything in host memory, or with weights and state on disk."""
    on_disk: dict[str, Any] = {}
    if place == "nvme":
        nvme = NVMeConfig(path=swap, budget="64GiB")
        on_disk = {"nvme": nvme, "placement": StaticPlacement(param_nvme=1, state_nvme=1)}
    return GeminiConfig(
        device="cpu",
        dtype=torch.float32,
        gradient_accumulation=False,
        overlap=overlap,
        tile_numel=1 << 19,
        **on_disk,
    )


def batches(vocabulary: int, batch: int, seq: int) -> Iterator[torch.Tensor]:
    """Yield random tokens, int64 [batch, seq], the same in every run."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(0, vocabulary, (batch, seq), generator=generator)


def time_step(engine: GeminiDDP, optimizer: HybridAdam, batch: torch.Tensor) -> float:
    """Take a step; return its seconds."""
    start = time.perf_counter()
    engine(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def measure(
    place: str, overlap: str, options: argparse.Namespace, profile: HardwareProfile, swap: str
) -> dict[str, Any]:
    """Train, and return what was predicted and what was measured."""
    shape = SHAPES[options.model]
    torch.manual_seed(0)
    model = build_model(options.model, options.seq, "cpu")
    flops = flops_of(model, shape, options.batch, options.seq)
    feed = batches(shape.get("vocab_size", 50257), options.batch, options.seq)
    with GeminiDDP(model, config_for(place, overlap, swap)) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-5)
        times = [time_step(engine, optimizer, next(feed)) for _ in range(NUM_WARM_UPS + options.steps)]
        seconds = times[NUM_WARM_UPS:]
        report = engine.memory_report(profile=profile, flops=flops)
    predicted = report.predicted
    assert predicted is not None
    row: dict[str, Any] = {"system": f"gemini {place}", "overlap": overlap, "params": report.num_params}
    row |= {"flops": flops.forward + flops.backward}
    row |= spread_of(seconds, "step_s") | {"reported_s": report.step_s, "predicted_s": predicted.step_s}
    row |= {"error": predicted.step_s / row["step_s"] - 1, "bottleneck": predicted.bottleneck.value}
    row |= {f"{channel.name.lower()}_s": s for channel, s in predicted.seconds.items()}
    row["fetch_stall_s"], row["update_stall_s"] = report.fetch_stall_s, report.update_stall_s
    return row


def main() -> None:
    """Measure the machine, then each placement and overlap."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a step")
    parser.add_argument("--seq", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--swap", type=Path, help="directory on the drive to use (a temporary one here)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.swap or Path.cwd(), prefix="prediction-swap-") as swap:
        before = measure_hardware(swap, "cpu", seconds=1.0, disk_seconds=DISK_SECONDS)
        rows = [measure(place, overlap, options, before, swap) for place, overlap in RUNS]
        after = measure_hardware(swap, "cpu", seconds=1.0, disk_seconds=DISK_SECONDS)
    profiles = {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
    settings = {name: getattr(options, name) for name in ("model", "batch", "seq", "steps")}
    counted = counted_flops(options)
    print(f"operations in a step: {rows[0]['flops']:.4g} by the formula, {counted:.4g} counted")
    write_results(options.json, rows, COLUMNS, settings=settings, profiles=profiles, counted_flops=counted)


if __name__ == "__main__":
    main()
