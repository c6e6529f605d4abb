"""Measure on a GPU whose memory is capped to that of a smaller card: bandwidths, a model that fits, one that does not.

    python benchmarks/gpu.py --out benchmarks/results

First copies and optimizer kernels beside the device's ceilings. Then, for each cap, a model that plain PyTorch can
hold there, trained by it and by Gemini with all optimizer state in host memory, and the shape of Llama-7B in full
fine-tuning; at the largest cap both also by DeepSpeed's ZeRO-Offload, the second by torchao's CPUOffloadOptimizer.
Steps of 16k tokens, clipping on where the system can clip. Every run is a process of its own: what fails, or for which
time has run out, becomes a row that says so. gpu_systems.py says what the systems are, gpu_bandwidth.py what the
bandwidths are.

`of_ceiling` is a bandwidth over that of the copy it is to be compared with; `of_torch` is tokens/s over the best
all-in-GPU run of the same model and cap, `of_deepspeed` over DeepSpeed's.

The result file is gpu_<device>_<date>.json, that of a rehearsal with --device cpu gpu-rehearsal_cpu_<date>.json, which
no table takes for a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from children import run_child
from gpu_systems import SHAPES, add_options
from results_file import missing_row, write_results

HERE = Path(__file__).parent
GB = 10**9
COLUMNS = (
    "task",
    "model",
    "cap_gb",
    "system",
    "tokens_per_s",
    "step_s",
    "peak_device_bytes",
    "peak_rss_bytes",
    "ms",
    "gb_per_s",
    "of_ceiling",
    "of_torch",
    "of_deepspeed",
)
FITTING = {10: "llama-0.4b", 16: "llama-0.7b", 24: "llama-1b"}
"""By cap in GB, a model whose 16 bytes a parameter and activations plain PyTorch can hold there."""
SLICES = {10: 8, 16: 4, 24: 2}
"""By cap in GB, in how many slices the batch passes through a block of the model that does not fit."""
NAMES = {
    "torch-autocast": "torch autocast, all on the GPU",
    "torch-bf16": "torch bf16, all on the GPU",
    "gemini-host": "gemini, state on the host",
    "gemini-stream": "gemini, all on the host",
    "gemini-auto": "gemini auto, host",
    "deepspeed-host": "deepspeed zero-2 host",
    "torchao-host": "torchao host",
}
OWN = (("fits", "torch-autocast"), ("fits", "gemini-host"), ("exceeds", "gemini-host"))
PEERS = (("fits", "deepspeed-host"), ("exceeds", "deepspeed-host"), ("exceeds", "torchao-host"))
ASIDE = (("fits", "torch-bf16"), ("fits", "gemini-stream"), ("fits", "gemini-auto"))
"""Tasks and systems: of every cap, and of the largest cap only."""
LONGEST_FITTING_S = 75.0
LONGEST_S = 150.0
SHORTEST_S = 20.0
"""A run that would have less time than this is not begun."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run."""

    task: str
    """"fits" or "exceeds": whether plain PyTorch can hold the model under the cap."""
    model: str
    system: str
    cap_nbytes: int
    slices: int = 1
    timeout_s: float

    @property
    def label(self) -> Row:
        """What identifies its row."""
        return {"task": self.task, "model": self.model, "cap_gb": self.cap_nbytes / GB}

    def command(self, options: argparse.Namespace) -> list[str]:
        """Return the child's command."""
        command = [sys.executable, str(HERE / "gpu_systems.py"), "--system", self.system, "--model", self.model]
        command += ["--cap", str(self.cap_nbytes), "--slices", str(self.slices)]
        for name in ("device", "batch", "seq", "steps", "seconds", "swap", "host-budget"):
            value = getattr(options, name.replace("-", "_"))
            command += [] if value is None else [f"--{name}", str(value)]
        return command


def plan_runs(caps_gb: list[int], *, is_rehearsal: bool = False) -> list[Run]:
    """Return all runs, in the order in which they are to be taken as long as there is time.

    That is the largest cap without peers, the smallest, the peers, the caps between, and last what is only of interest.

    Args:
        caps_gb: caps, of those in FITTING.
        is_rehearsal: with the tiny model and without other people's programs.

    Returns:
        The runs.
    """
    largest, smallest = max(caps_gb), min(caps_gb)
    order = [(largest, OWN), (smallest, OWN), (largest, PEERS)]
    order += [(cap, OWN) for cap in sorted(caps_gb)] + [(largest, ASIDE)]
    chosen = dict.fromkeys((cap, task, system) for cap, runs in order for task, system in runs)
    return [
        make_run(cap, task, system, is_rehearsal=is_rehearsal)
        for cap, task, system in chosen
        if not (is_rehearsal and (task, system) in PEERS)
    ]


def make_run(cap_gb: int, task: str, system: str, *, is_rehearsal: bool) -> Run:
    """Return a run of one of the tasks."""
    model = FITTING[cap_gb] if task == "fits" else "llama-7b"
    slices = SLICES[cap_gb] if task == "exceeds" and system.startswith("gemini") else 1
    return Run(
        task=task,
        model="tiny" if is_rehearsal else model,
        system=system,
        cap_nbytes=cap_gb * GB,
        slices=min(slices, 2) if is_rehearsal else slices,
        timeout_s=LONGEST_FITTING_S if task == "fits" else LONGEST_S,
    )


def measure_bandwidths(options: argparse.Namespace, timeout_s: float) -> list[Row]:
    """Measure copies and kernels in a child."""
    command = [sys.executable, str(HERE / "gpu_bandwidth.py"), "--device", options.device]
    if options.device == "cpu":
        command += ["--numel", "8192", "--copy-bytes", "8192", "--repeats", "2"]
    try:
        rows: list[Row] = run_child(command, timeout_s)
    except RuntimeError as error:
        return [missing_row("gemini", str(error), task="bandwidth")]
    return rows


def train(run: Run, options: argparse.Namespace, left_s: float) -> Row:
    """Train one system in a child and return its row, or the row that says why there is none."""
    name = NAMES[run.system]
    if left_s < SHORTEST_S:
        return missing_row(name, f"no time was left, of {options.time_limit:.0f} s", **run.label)
    try:
        result = run_child(run.command(options), min(run.timeout_s, left_s))
    except RuntimeError as error:
        return missing_row(name, str(error), **run.label)
    return {**run.label, "system": name, **result}


def compare(rows: list[Row]) -> None:
    """Add to each of our runs its tokens/s over the best of each peer's of the same task, model and cap."""
    trained = [row for row in rows if "tokens_per_s" in row]
    for row in trained:
        alike = [other for other in trained if all(other[key] == row[key] for key in ("task", "model", "cap_gb"))]
        for name in ("torch", "deepspeed"):
            speeds = [other["tokens_per_s"] for other in alike if other["system"].split()[0] == name]
            if row["system"].startswith("gemini") and speeds:
                row[f"of_{name}"] = row["tokens_per_s"] / max(speeds)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--caps", type=int, nargs="+", choices=sorted(FITTING), default=sorted(FITTING), help="in GB")
    parser.add_argument("--time-limit", type=float, default=500.0, help="seconds for everything (%(default)s)")
    out = Path(os.environ.get("OUT", HERE / "results"))
    parser.add_argument("--out", type=Path, default=out, help="directory for the result file ($OUT, else results)")
    return parser.parse_args(arguments)


def result_path(out: Path, device: str) -> Path:
    """Return where results go, in the form that tables.py looks for."""
    date = datetime.date.today().isoformat()
    if device == "cpu":
        return out / f"gpu-rehearsal_cpu_{date}.json"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return out / f"gpu_{name}_{date}.json"


def main() -> None:
    """Measure everything that there is time for, most important first."""
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none")
    deadline_s = time.monotonic() + options.time_limit
    rows = measure_bandwidths(options, timeout_s=min(90.0, options.time_limit))
    for run in plan_runs(options.caps, is_rehearsal=options.device == "cpu"):
        row = train(run, options, deadline_s - time.monotonic())
        rows.append(row)
        outcome = row.get("missing") or f"{row['tokens_per_s']:.0f} tokens/s"
        print(f"{row['model']}, {row['cap_gb']:g} GB, {row['system']}: {outcome}", flush=True)
    compare(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("batch", "seq", "steps", "seconds", "host_budget")}
    shapes = {name: SHAPES[name] for name in sorted({row["model"] for row in rows if "model" in row})}
    write_results(result_path(options.out, options.device), rows, COLUMNS, settings=settings, shapes=shapes)


if __name__ == "__main__":
    main()
