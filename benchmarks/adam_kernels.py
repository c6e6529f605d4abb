"""Speed of the native split-bfloat16 Adam beside torch's fused float32 AdamW and a plain memory copy.

    python benchmarks/adam_kernels.py [--numel N] [--threads N] [--repeats N] [--json PATH]

All are measured in one run on the same machine, interleaved, and the median of the repeats is given. GB/s counts the
bytes an update must read and write: split bfloat16 with a bfloat16 gradient moves 26 bytes per parameter (2 + 2 + 4 + 4
read and written, 2 read), torch's float32 28 (4 + 4 + 4 read and written, 4 read), a copy twice its length.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import describe_environment

from gemini.kernels import AdamHyper, AdamSegment, AdamTile, WorkerPool, adam_update, resolve_isa, supported_isas

SPLIT_NBYTES = 26
FUSED_NBYTES = 28
HYPER = AdamHyper(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def make_tile(numel: int) -> AdamTile:
    """Return a tile with a bfloat16 gradient, every page touched."""
    return AdamTile(
        working=torch.randn(numel).to(torch.bfloat16),
        master=torch.randint(-32768, 32768, (numel,), dtype=torch.int16),
        momentum=torch.randn(numel) * 1e-3,
        variance=torch.rand(numel) * 1e-6,
        grad=torch.randn(numel).to(torch.bfloat16),
        grad_scale=1.0,
        segments=(AdamSegment(begin=0, end=numel, hyper=HYPER, step=10),),
    )


def make_fused_step(numel: int) -> Callable[[], None]:
    """Return a call that makes one step of torch's fused AdamW on float32."""
    parameter = torch.nn.Parameter(torch.randn(numel))
    parameter.grad = torch.randn(numel)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.step()

    return step


def with_torch_threads(num_threads: int, call: Callable[[], object]) -> Callable[[], None]:
    """Return `call` under a number of torch threads."""

    def run() -> None:
        torch.set_num_threads(num_threads)
        call()

    return run


def measure(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Time every call `repeats` times in turn, after one warm-up each; seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Measure, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=1 << 24, help="parameters; far larger than the caches")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    numel, num_threads = options.numel, options.threads
    tile, fused_step = make_tile(numel), make_fused_step(numel)
    copy_src, copy_dst = torch.randn(numel * 4), torch.empty(numel * 4)
    with WorkerPool(num_threads) as pool:
        calls: dict[str, Callable[[], None]] = {}
        nbytes: dict[str, int] = {}

        def add(name: str, call: Callable[[], None], moved_nbytes: int) -> None:
            calls[name], nbytes[name] = call, moved_nbytes

        for isa in supported_isas():
            add(
                f"split Adam {isa.name.lower()}, 1 thread",
                functools.partial(adam_update, tile, isa=isa),
                SPLIT_NBYTES * numel,
            )
        add(f"split Adam, {num_threads} threads", lambda: pool.submit_adam(tile).wait(), SPLIT_NBYTES * numel)
        for count in sorted({1, num_threads}):
            name = f"torch fused AdamW float32, {count} thread{'s' * (count > 1)}"
            add(name, with_torch_threads(count, fused_step), FUSED_NBYTES * numel)
        add("copy, 1 thread", with_torch_threads(1, lambda: copy_dst.copy_(copy_src)), 2 * copy_src.nbytes)
        add(f"copy, {num_threads} threads", lambda: pool.submit_copy(copy_dst, copy_src).wait(), 2 * copy_src.nbytes)
        seconds = measure(calls, options.repeats)

    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            {
                "name": name,
                "gb_per_s": nbytes[name] / median / 1e9,
                "ns_per_param": None if name.startswith("copy") else median / numel * 1e9,
                "median_s": median,
                "min_s": min(times),
                "max_s": max(times),
            }
        )
    print(f"{numel} parameters, {num_threads} threads, best isa {resolve_isa('auto').name}, torch {torch.__version__}")
    for row in rows:
        per_param = "" if row["ns_per_param"] is None else f"{row['ns_per_param']:8.3f} ns/param"
        print(f"{row['name']:40} {row['gb_per_s']:8.2f} GB/s {per_param}")
    if options.json is not None:
        report = {
            "numel": numel,
            "num_threads": num_threads,
            "repeats": options.repeats,
            "isa": resolve_isa("auto").name,
            "environment": describe_environment(),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
