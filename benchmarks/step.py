"""A training step of Gemini beside what one would use instead: seconds, tokens per second and resident memory.

Every system trains the same GPT-2 shape on the same batches in a process of its own, one after the other: plain
PyTorch, Gemini with everything in host memory and with (almost) everything on disk, DeepSpeed ZeRO-3 with both.
Clipping is on in all of them: "idle", with a threshold that is never reached, and "active", where every step clips;
what the others do does not depend on it, so they run once. A processor without bfloat16 instructions multiplies
bfloat16 a hundred times slower than float32, so --dtype auto takes the faster of the two for all systems alike and says
which.

The drive's bandwidth is measured before and after each run that uses it; `io_floor_s` is the time in which the bytes
that a step on disk must move cross at that bandwidth: weights read for forward and backward and written once, state
read and written once.

    python benchmarks/step.py [--model gpt2 | gpt2-medium | gpt2-large | tiny] [--swap DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results_file import missing_row, write_results
from step_systems import MAX_NORMS, SHAPES, SYSTEMS, add_options

from gemini.offload.bandwidth import DiskBandwidth, measure_disk

COLUMNS = ("model", "system", "clip", "step_s", "tokens_per_s", "peak_rss_bytes", "io_floor_s", "ratio")
NAMES = {
    "plain": "torch plain",
    "gemini-host": "gemini host",
    "gemini-nvme": "gemini nvme",
    "deepspeed-host": "deepspeed zero-3 host",
    "deepspeed-nvme": "deepspeed zero-3 nvme",
}
CALIBRATION_NBYTES = 2 << 30
CALIBRATION_S = 2.0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--clips", nargs="+", choices=MAX_NORMS, default=list(MAX_NORMS), help="of ours")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a run counts as failed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args()


def faster_dtype(n: int = 512) -> str:
    """Return "bf16" if this processor multiplies bfloat16 at least as fast as float32, else "fp32"."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(n, n).to(dtype)
        a @ a
        start = time.perf_counter()
        a @ a
        return time.perf_counter() - start

    return "bf16" if seconds(torch.bfloat16) <= seconds(torch.float32) else "fp32"


def io_floor_s(num_params: int, dtype: str, disks: Sequence[DiskBandwidth]) -> float:
    """Return the least time in which a step's bytes cross, with the mean of several measured bandwidths.

    Args:
        num_params: of the model.
        dtype: "fp32" or "bf16"; state is 8 or 10 bytes a parameter, a weight 4 or 2.
        disks: what was measured.
    """
    weight, state = {"fp32": (4, 8), "bf16": (2, 10)}[dtype]
    read, written = num_params * (2 * weight + state), num_params * (weight + state)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return max(
        read / mean([disk.read_bytes_per_s for disk in disks]),
        written / mean([disk.write_bytes_per_s for disk in disks]),
        (read + written) / mean([disk.mixed_bytes_per_s for disk in disks]),
    )


def run(system: str, clip: str, arguments: argparse.Namespace, swap: Path) -> dict[str, Any]:
    """Train one system in a child and return its row, or the row that says why there is none."""
    named = {"model": arguments.model, "clip": clip, "dtype": arguments.dtype}
    options = {name: getattr(arguments, name) for name in ("model", "batch", "seq", "dtype", "steps", "overlap")}
    command = [sys.executable, str(Path(__file__).parent / "step_systems.py"), "--system", system, "--clip", clip]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    uses_disk = system.endswith("nvme")
    disks = [measure_disk(swap, CALIBRATION_NBYTES, CALIBRATION_S)] if uses_disk else []
    try:
        done = subprocess.run(
            [*command, "--swap", str(swap)], capture_output=True, text=True, timeout=arguments.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return missing_row(NAMES[system], f"not done after {arguments.timeout:.0f} s", **named)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == -9:
            reason = "killed, most likely for memory"
        return missing_row(NAMES[system], reason, **named)
    row = {"system": NAMES[system], **named, **json.loads(done.stdout.strip().splitlines()[-1])}
    if uses_disk:
        disks.append(measure_disk(swap, CALIBRATION_NBYTES, CALIBRATION_S))
        row["io_floor_s"] = io_floor_s(row["params"], arguments.dtype, disks)
        row["disk_gb_per_s"] = [
            [round(rate / 1e9, 2) for rate in (d.read_bytes_per_s, d.write_bytes_per_s, d.mixed_bytes_per_s)]
            for d in disks
        ]
    return row


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each of our rows its ratio: in memory to plain PyTorch, on disk to our own in memory or the drive."""
    times = {(row["system"], row["clip"]): row["step_s"] for row in rows if "step_s" in row}
    for row in rows:
        reference = None
        if row["system"] == "gemini host":
            reference = next((time for (system, _), time in times.items() if system == "torch plain"), None)
        elif row["system"] == "gemini nvme" and "step_s" in row:
            reference = max(times.get(("gemini host", row["clip"]), 0.0), row["io_floor_s"])
        if reference and "step_s" in row:
            row["ratio"] = row["step_s"] / reference


def main() -> None:
    """Run every system, idle first."""
    arguments = parse_arguments()
    if arguments.dtype == "auto":
        arguments.dtype = faster_dtype()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.swap or Path.cwd(), prefix="step-swap-") as swap:
        for clip in arguments.clips:
            for system in arguments.systems:
                if clip != arguments.clips[0] and not system.startswith("gemini"):
                    continue
                rows.append(run(system, clip, arguments, Path(swap)))
                row = rows[-1]
                print(f"{row['system']}, clip {clip}: {row.get('step_s', row.get('missing'))}", flush=True)
    compare(rows)
    settings = {name: getattr(arguments, name) for name in ("batch", "seq", "dtype", "steps", "overlap")}
    write_results(arguments.json, rows, COLUMNS, settings=settings, shapes=SHAPES[arguments.model])


if __name__ == "__main__":
    main()
