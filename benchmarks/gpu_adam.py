"""Measure the Adam update and the gradient store in device memory.

    python benchmarks/gpu_adam.py --json gpu_adam.json

Rows: Gemini's Triton kernel and its torch fallback for each state format, torch.optim.AdamW(fused=True), the gradient
store with its sum of squares, and a device-to-device copy, the speed of light. GB/s counts every byte that must be read
or written once (10^9 bytes per second). Times are medians over CUDA events.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from gemini.kernels.cpu import AdamHyper, AdamSegment, GradMode
from gemini.kernels.device import (
    DeviceKernels,
    DeviceTile,
    device_adam_update,
    device_store_gradient,
    select_device_kernels,
)

HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, is_decoupled=True)
NUM_WARMUPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement."""

    name: str
    median_ms: float
    min_ms: float
    max_ms: float
    gb_per_s: float


def measure(name: str, call: Callable[[], object], nbytes: int, num_repeats: int) -> Row:
    """Time a call that moves `nbytes` bytes on the current stream."""
    for _ in range(NUM_WARMUPS):
        call()
    times_ms = []
    for _ in range(num_repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    median_ms = statistics.median(times_ms)
    return Row(
        name=name,
        median_ms=median_ms,
        min_ms=min(times_ms),
        max_ms=max(times_ms),
        gb_per_s=nbytes / median_ms / 1e6,
    )


def make_tile(dtype: torch.dtype, numel: int, num_segments: int) -> DeviceTile:
    """Return a tile with gradients in the working type and segments of equal length."""
    device = torch.device("cuda")
    cuts = [numel * index // num_segments for index in range(num_segments + 1)]
    master = torch.randn(numel, device=device)
    residual = None
    if dtype == torch.bfloat16:
        residual = torch.zeros(numel, dtype=torch.int16, device=device)
    elif dtype == torch.float16:
        residual = master
    return DeviceTile(
        working=master.to(dtype),
        master=residual,
        momentum=torch.zeros(numel, device=device),
        variance=torch.zeros(numel, device=device),
        grad=torch.randn(numel, device=device).to(dtype),
        grad_scale=1.0,
        segments=tuple(
            AdamSegment(begin=cuts[index], end=cuts[index + 1], hyper=HYPER, step=10) for index in range(num_segments)
        ),
    )


def measure_kernels(kernels: DeviceKernels, numel: int, num_segments: int, num_repeats: int) -> list[Row]:
    """Measure the Adam update of each format and the gradient store."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tile = make_tile(dtype, numel, num_segments)
        # Momentum, variance and working weights (f16: and master) go both ways, the gradient one.
        itemsize = {
            torch.bfloat16: 2 * 2 + 2 * 2 + 16 + 2,
            torch.float16: 2 + 2 * 4 + 16 + 2,
            torch.float32: 8 + 16 + 4,
        }
        name = f"{kernels.name} adam {str(dtype).removeprefix('torch.')}"
        rows.append(measure(name, partial(kernels.adam_update, tile), itemsize[dtype] * numel, num_repeats))
        del tile
    src = torch.randn(numel, device="cuda").to(torch.bfloat16)
    dst = torch.zeros(numel, device="cuda")
    add = partial(kernels.store_gradient, dst, src, mode=GradMode.ADD)
    rows.append(measure(f"{kernels.name} gradient add bf16 to f32", add, 10 * numel, num_repeats))
    return rows


def measure_references(numel: int, num_repeats: int) -> list[Row]:
    """Measure torch's fused AdamW on float32 and a copy."""
    param = torch.nn.Parameter(torch.randn(numel, device="cuda"))
    param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.1, fused=True)
    rows = [measure("torch.optim.AdamW(fused=True) float32", optimizer.step, 28 * numel, num_repeats)]
    source, target = torch.empty(2, numel, device="cuda").unbind()
    rows.append(measure("device memcpy", lambda: target.copy_(source), 8 * numel, num_repeats))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 26, help="elements of the tile")
    parser.add_argument("--segments", type=int, default=50, help="parameters in the tile")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each row")
    parser.add_argument("--json", type=Path, help="write the rows and what they were measured on to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_adam.py needs a CUDA device, found none: run it on a machine with an NVIDIA GPU and a CUDA torch")

    kernels = select_device_kernels(torch.device("cuda"))
    fallback = DeviceKernels(name="torch", adam_update=device_adam_update, store_gradient=device_store_gradient)
    rows = measure_references(args.numel, args.repeats)
    for each in (kernels, fallback) if kernels.name != "torch" else (fallback,):
        rows += measure_kernels(each, args.numel, args.segments, args.repeats)
    for row in rows:
        print(f"{row.name:42} {row.median_ms:9.3f} ms [{row.min_ms:.3f}, {row.max_ms:.3f}] {row.gb_per_s:8.0f} GB/s")
    if args.json is not None:
        record = {
            "command": sys.argv,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "numel": args.numel,
            "segments": args.segments,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
