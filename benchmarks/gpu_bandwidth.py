"""Measure copies between host and device, the Adam update and the gradient store, each beside the device's own ceiling.

Rows of task h2d, d2h and both: our transfers from and to our host memory; torch's copies from and to its pinned memory
are the ceiling. Rows of task adam and gradient: our Triton kernels and their torch fallback for each state format, and
torch.optim.AdamW(fused=True); a copy on the device is the ceiling. Adam in tiles is what an engine does: a launch for
every tile. GB/s counts every byte that must be read or written once, 10^9 bytes a second. Times are medians over CUDA
events.

Called by gpu.py; prints a line of JSON with the rows of each part as soon as they are measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from results_file import spread_of

from gemini.config import GeminiConfig
from gemini.kernels.adam_tile import AdamHyper, AdamSegment
from gemini.kernels.cpu import GradMode
from gemini.kernels.device import TORCH_KERNELS, DeviceKernels, select_device_kernels
from gemini.kernels.device_tile import DeviceChunk
from gemini.offload.resources import Resources, budgets_of, open_resources
from gemini.update.state_record import record_offsets

HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, is_decoupled=True)
NUM_WARM_UPS = 3
NUM_SEGMENTS = 50
ITEMSIZES = {
    torch.bfloat16: 2 * 2 + 2 * 2 + 16 + 2,
    torch.float16: 2 + 2 * 4 + 16 + 2,
    torch.float32: 8 + 16 + 4,
}
"""Bytes of an update per element: momentum, variance, weights and residual or master both ways, the gradient one way,
the float16 weight too."""
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Row = dict[str, Any]


def time_ms(device: torch.device, call: Callable[[], object], num_repeats: int) -> list[float]:
    """Return the milliseconds that a call takes on the current stream, or on the CPU, each time."""
    times = []
    for index in range(NUM_WARM_UPS + num_repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            elapsed_ms = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            call()
            elapsed_ms = (time.perf_counter() - begin) * 1e3
        if index >= NUM_WARM_UPS:
            times.append(elapsed_ms)
    return times


def row_of(system: str, task: str, nbytes: int, times_ms: list[float]) -> Row:
    """Return the row of a measurement that moved `nbytes` bytes."""
    spread = spread_of(times_ms, "ms")
    return {"system": system, "task": task, **spread, "gb_per_s": nbytes / spread["ms"] / 1e6}


# ---------------------------------------------------------------- copies


@contextmanager
def opened(device: torch.device, nbytes: int) -> Iterator[Resources]:
    """Open an engine's memory and copy engine, on a simulated device where there is no GPU."""
    kind = "cuda" if device.type == "cuda" else "simulated"
    config = GeminiConfig(device=kind, device_budget=4 * nbytes + (1 << 20), host_budget=4 * nbytes + (1 << 20))
    resources = open_resources(config, budgets_of(config), disk_nbytes=0)
    try:
        yield resources
    finally:
        resources.close()


def measure_copies(device: torch.device, nbytes: int, num_repeats: int) -> list[Row]:
    """Measure copies up, down and both at once, ours beside torch's."""
    rows = []
    with opened(device, nbytes) as resources:
        transfers, arena = resources.transfers, resources.arena
        ours = [arena.allocate(nbytes, "working"), arena.allocate(nbytes, "working")]
        theirs = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
        on_device = [transfers.allocate(nbytes, "slots"), transfers.allocate(nbytes, "slots")]
        streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

        def up_and_down() -> None:
            moves = [transfers.upload(on_device[0], ours[0]), transfers.download(ours[1], on_device[1])]
            for move in moves:
                move.wait_on_compute()

        def up_and_down_by_torch() -> None:
            copies = [(on_device[0], theirs[0]), (theirs[1], on_device[1])]
            for index, (dst, src) in enumerate(copies):
                if not streams:
                    dst.copy_(src)
                    continue
                streams[index].wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(streams[index]):
                    dst.copy_(src, non_blocking=True)
            for stream in streams:
                torch.cuda.current_stream(device).wait_stream(stream)

        calls: list[tuple[str, str, int, Callable[[], object]]] = [
            ("gemini host", "h2d", nbytes, lambda: transfers.upload(on_device[0], ours[0]).wait_on_compute()),
            ("ceiling", "h2d", nbytes, lambda: on_device[0].copy_(theirs[0], non_blocking=True)),
            ("gemini host", "d2h", nbytes, lambda: transfers.download(ours[1], on_device[1]).wait_on_compute()),
            ("ceiling", "d2h", nbytes, lambda: theirs[1].copy_(on_device[1], non_blocking=True)),
            ("gemini host", "both", 2 * nbytes, up_and_down),
            ("ceiling", "both", 2 * nbytes, up_and_down_by_torch),
        ]
        for system, task, moved_nbytes, call in calls:
            rows.append(row_of(system, task, moved_nbytes, time_ms(device, call, num_repeats)))
        transfers.synchronize()
        for buffer in on_device:
            transfers.free(buffer, "slots")
    return rows


# ---------------------------------------------------------------- kernels


def make_chunk(device: torch.device, dtype: torch.dtype, numel: int, num_segments: int, tile_numel: int) -> DeviceChunk:
    """Return a chunk with gradients in the working dtype, no momentum, and segments of equal length."""
    cuts = [numel * index // num_segments for index in range(num_segments + 1)]
    num_full = -(-numel // tile_numel) - 1
    offsets, last_offsets = record_offsets(tile_numel, dtype), record_offsets(numel - num_full * tile_numel, dtype)
    return DeviceChunk(
        working=torch.randn(numel, device=device).to(dtype),
        records=torch.zeros(num_full * offsets.nbytes + last_offsets.nbytes, dtype=torch.uint8, device=device),
        grad=torch.randn(numel, device=device).to(dtype),
        tile_numel=tile_numel,
        offsets=offsets,
        last_offsets=last_offsets,
        grad_scale=1.0,
        segments=tuple(AdamSegment(begin=begin, end=end, hyper=HYPER, step=10) for begin, end in pairwise(cuts)),
    )


def measure_kernels(device: torch.device, kernels: DeviceKernels, numel: int, num_repeats: int) -> list[Row]:
    """Measure the Adam update of each format, over one tile and over many, and the gradient store."""
    rows = []
    system = f"gemini {kernels.name}"
    for dtype, itemsize in ITEMSIZES.items():
        chunk = make_chunk(device, dtype, numel, NUM_SEGMENTS, numel)
        times = time_ms(device, partial(kernels.adam_update, chunk), num_repeats)
        rows.append(row_of(system, f"adam {DTYPE_NAMES[dtype]}", itemsize * numel, times))
    chunk = make_chunk(device, torch.bfloat16, numel, NUM_SEGMENTS, 1 << 20)  # as an engine has it
    times = time_ms(device, partial(kernels.adam_update, chunk), num_repeats)
    rows.append(row_of(system, "adam bf16 in tiles", ITEMSIZES[torch.bfloat16] * numel, times))
    src = torch.randn(numel, device=device).to(torch.bfloat16)
    dst = torch.zeros(numel, device=device)
    times = time_ms(device, partial(kernels.store_gradient, dst, src, mode=GradMode.ADD), num_repeats)
    rows.append(row_of(system, "gradient bf16 to fp32", 10 * numel, times))
    return rows


def measure_references(device: torch.device, numel: int, num_repeats: int) -> list[Row]:
    """Measure torch's fused AdamW in float32 and a copy on the device."""
    param = torch.nn.Parameter(torch.randn(numel, device=device))
    param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.1, fused=True)
    source, target = torch.empty(2, numel, device=device).unbind()
    return [
        row_of("torch fused", "adam fp32", 28 * numel, time_ms(device, optimizer.step, num_repeats)),
        row_of("ceiling", "device copy", 8 * numel, time_ms(device, partial(target.copy_, source), num_repeats)),
    ]


def compare(rows: list[Row]) -> None:
    """Add to each row its bandwidth as a share of the ceiling's: the same copy, or a copy on the device."""
    ceilings = {row["task"]: row["gb_per_s"] for row in rows if row["system"] == "ceiling"}
    for row in rows:
        ceiling = ceilings.get(row["task"], ceilings.get("device copy"))
        if row["system"] != "ceiling" and ceiling is not None and "gb_per_s" in row:
            row["of_ceiling"] = row["gb_per_s"] / ceiling


def measure(device: torch.device, *, numel: int, copy_nbytes: int, num_repeats: int) -> list[Row]:
    """Measure everything.

    Args:
        device: where.
        numel: elements that an update has.
        copy_nbytes: bytes of a copy.
        num_repeats: timed calls of each row.

    Returns:
        The rows, with shares of the ceilings.
    """
    rows = [row for part in measure_parts(device, numel, copy_nbytes, num_repeats) for row in part]
    compare(rows)
    return rows


def measure_parts(device: torch.device, numel: int, copy_nbytes: int, num_repeats: int) -> Iterator[list[Row]]:
    """Yield the rows of `measure` part by part, without shares."""
    yield measure_references(device, numel, num_repeats)
    chosen = select_device_kernels(device)
    yield measure_kernels(device, chosen, numel, num_repeats)
    yield measure_copies(device, copy_nbytes, num_repeats)
    if chosen is not TORCH_KERNELS:
        yield measure_kernels(device, TORCH_KERNELS, numel, num_repeats)


def main() -> None:
    """Measure and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that it runs")
    parser.add_argument("--numel", type=int, default=1 << 26, help="elements of an update")
    parser.add_argument("--copy-bytes", type=int, default=1 << 28, help="bytes of a copy")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each row")
    options = parser.parse_args()
    device = torch.device(options.device)
    for rows in measure_parts(device, options.numel, options.copy_bytes, options.repeats):
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
