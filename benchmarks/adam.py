"""One optimizer update on the CPU: the native Adam, what a user would run instead, and what memory allows.

    python benchmarks/adam.py [--numel N] [--threads N] [--repeats N] [--all-isas] [--json PATH]

The task is the same for all: from a bfloat16 gradient, a clip factor and a float32 master to the new master, moments
and bfloat16 weight. Every system runs once per round; medians over the rounds are given. `bytes_per_param` counts what
each must read and write, and no more:

gemini    26: working, residual, momentum, variance read and written (2 + 2 + 4 + 4), gradient read (2)
ceiling   26: a native pass over the same memory by the same threads, which inverts what Adam writes; twice, so that
              Adam finds its numbers again, and half of the time counts
torch     44: gradient to float32 (2 + 4), fused AdamW that divides by the clip factor and stores the gradient it used
              (4 + 4 + 4 + 4 read and written), master to bfloat16 (4 + 2)
deepspeed 48: gradient to float32 (2 + 4), times the clip factor in place (4 + 4), DeepSpeedCPUAdam (4 + 4 + 4 read and
              written, 4 read), master to bfloat16 (4 + 2)

The peers' buffers are made once. torch has no faster way to the scaled float32 gradient: one multiplication with mixed
dtypes takes six times as long as a copy and an in-place multiplication. `of_ceiling` is the median over the rounds of
a system's GB/s over the ceiling's in the same round, because bandwidth drifts while other machines share the memory.

The number of parameters is no power of two on purpose: arrays of exactly 128 MiB lie 128 MiB and a page apart, and two
such streams evict each other from the first-level cache of a Zen processor, which doubles everybody's time.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results_file import missing_row, spread_of, write_results

from gemini.kernels import (
    AdamHyper,
    AdamSegment,
    AdamTile,
    WorkerPool,
    adam_update,
    join_master,
    split_master,
    supported_isas,
)

HYPER = AdamHyper(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
CLIP_FACTOR = 0.5
NUM_COMPARED = 4096


@dataclass(frozen=True)
class Contestant:
    """One way to do the task.

    Attributes:
        system: name in the results.
        num_threads: threads it uses.
        bytes_per_param: what it must read and write.
        update: makes one update, or `num_passes` of them.
        masters: returns the first NUM_COMPARED masters, float32; None if there are none to compare.
        num_passes: how often `update` does it.
    """

    system: str
    num_threads: int
    bytes_per_param: int
    update: Callable[[], object]
    masters: Callable[[], torch.Tensor] | None = None
    num_passes: int = 1


@dataclass(frozen=True)
class Task:
    """What every contestant starts from; moments start from zero."""

    masters: torch.Tensor  # float32 [numel]
    grads: torch.Tensor  # bfloat16 [numel]


def make_task(numel: int) -> Task:
    """Return weights and a gradient of the usual sizes."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(numel, generator=generator).mul_(1e-3).to(torch.bfloat16)
    return Task(masters=torch.randn(numel, generator=generator).mul_(0.02), grads=grads)


def make_tile(task: Task) -> AdamTile:
    """Return the task in split bfloat16."""
    numel = task.masters.numel()
    working, residual = torch.empty(numel, dtype=torch.bfloat16), torch.empty(numel, dtype=torch.int16)
    split_master(working, residual, task.masters)
    return AdamTile(
        working=working,
        master=residual,
        momentum=torch.zeros(numel),
        variance=torch.zeros(numel),
        grad=task.grads.clone(),
        grad_scale=CLIP_FACTOR,
        segments=(AdamSegment(begin=0, end=numel, hyper=HYPER, step=1),),
    )


def masters_of(tile: AdamTile) -> torch.Tensor:
    """Return a tile's first masters."""
    assert tile.master is not None
    masters = torch.empty(NUM_COMPARED)
    join_master(masters, tile.working[:NUM_COMPARED], tile.master[:NUM_COMPARED])
    return masters


def gemini(tile: AdamTile, pool: WorkerPool) -> Contestant:
    """Return the native Adam in the worker pool."""
    return Contestant(
        "gemini", pool.num_threads, 26, lambda: pool.submit_adam(tile).wait(), functools.partial(masters_of, tile)
    )


def gemini_by_isa(tile: AdamTile) -> list[Contestant]:
    """Return the native Adam in the calling thread, once per instruction set."""
    return [
        Contestant(f"gemini, {isa.name.lower()}", 1, 26, functools.partial(adam_update, tile, isa=isa))
        for isa in supported_isas()
    ]


def ceiling(tile: AdamTile, pool: WorkerPool) -> Contestant:
    """Return the sweep over the memory of `gemini`."""
    assert tile.master is not None
    inverted = [tile.working, tile.master, tile.momentum, tile.variance]

    def sweep_twice() -> None:
        for _ in range(2):
            pool.submit_sweep([tile.grad], inverted).wait()

    return Contestant("ceiling", pool.num_threads, 26, sweep_twice, num_passes=2)


def torch_fused(task: Task, num_threads: int) -> Contestant:
    """Return torch's fused AdamW on a float32 master, with the casts it needs."""
    parameter = torch.nn.Parameter(task.masters.clone())
    gradient = parameter.grad = torch.empty_like(task.masters)
    weight, source = torch.empty_like(task.grads), task.grads.clone()
    optimizer = torch.optim.AdamW([parameter], lr=HYPER.lr, eps=HYPER.eps, weight_decay=HYPER.weight_decay, fused=True)
    # The way torch.amp hands its loss scale to a fused optimizer; gradients are divided by it.
    optimizer.grad_scale = torch.tensor(1 / CLIP_FACTOR)
    optimizer.found_inf = torch.tensor(0.0)

    def update() -> None:
        gradient.copy_(source)
        optimizer.step()
        weight.copy_(parameter.detach())

    return Contestant("torch fused AdamW", num_threads, 44, update, lambda: parameter.detach()[:NUM_COMPARED])


def deepspeed_adam(task: Task, num_threads: int) -> Contestant:
    """Return DeepSpeedCPUAdam on a float32 master, with the casts it needs.

    Raises:
        Exception: DeepSpeed is not installed, or does not build here.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(task.masters.clone())
    gradient = parameter.grad = torch.empty_like(task.masters)
    weight, source = torch.empty_like(task.grads), task.grads.clone()
    optimizer = DeepSpeedCPUAdam([parameter], lr=HYPER.lr, eps=HYPER.eps, weight_decay=HYPER.weight_decay)

    def update() -> None:
        gradient.copy_(source).mul_(CLIP_FACTOR)
        optimizer.step()
        weight.copy_(parameter.detach())

    return Contestant("deepspeed CPUAdam", num_threads, 48, update, lambda: parameter.detach()[:NUM_COMPARED])


def check_agreement(contestants: list[Contestant]) -> None:
    """Check, after one update each, that all have done the same task."""
    compared = [contestant for contestant in contestants if contestant.masters is not None]
    for contestant in compared[1:]:
        torch.testing.assert_close(
            contestant.masters(), compared[0].masters(), rtol=1e-6, atol=1e-8, msg=f"{contestant.system} differs"
        )


def measure(contestants: list[Contestant], repeats: int) -> list[list[float]]:
    """Return the seconds of each contestant in each round; the first update of each is not timed."""
    for contestant in contestants:
        contestant.update()
    check_agreement(contestants)
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats):
        for times, contestant in zip(seconds, contestants, strict=True):
            begin = time.perf_counter()
            contestant.update()
            times.append((time.perf_counter() - begin) / contestant.num_passes)
    return seconds


def row_of(contestant: Contestant, times: list[float], ceiling_times: list[float], numel: int) -> dict[str, Any]:
    """Return a contestant's results; `ceiling_times` are those of 26 bytes per parameter by as many threads."""
    ns_per_param = [seconds / numel * 1e9 for seconds in times]
    nbytes = contestant.bytes_per_param
    of_ceiling = [nbytes / 26 * best / own for own, best in zip(times, ceiling_times, strict=True)]
    return {
        "system": contestant.system,
        "threads": contestant.num_threads,
        **spread_of(ns_per_param, "ns_per_param"),
        "bytes_per_param": nbytes,
        "gb_per_s": nbytes / statistics.median(ns_per_param),
        "of_ceiling": statistics.median(of_ceiling),
    }


def main() -> None:
    """Measure, print a table and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=30_000_000, help="parameters; far larger than the caches")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--all-isas", action="store_true", help="add every instruction set, in one thread")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = make_task(options.numel)
    with WorkerPool(options.threads) as pool, WorkerPool(1) as single:
        tile = make_tile(task)
        contestants = [ceiling(tile, pool), gemini(tile, pool), torch_fused(task, options.threads)]
        missing = []
        try:
            contestants.append(deepspeed_adam(task, options.threads))
        except Exception as error:  # whatever its build raises
            missing.append(missing_row("deepspeed CPUAdam", f"{type(error).__name__}: {error}"))
        if options.all_isas:
            tile = make_tile(task)
            contestants += [ceiling(tile, single), *gemini_by_isa(tile)]
        seconds = measure(contestants, options.repeats)
    ceilings = {
        contestant.num_threads: times
        for contestant, times in zip(contestants, seconds, strict=True)
        if contestant.system == "ceiling"
    }
    rows = [
        row_of(contestant, times, ceilings[contestant.num_threads], options.numel)
        for contestant, times in zip(contestants, seconds, strict=True)
    ]
    columns = ["system", "threads", "ns_per_param", "ns_per_param_min", "ns_per_param_max"]
    columns += ["bytes_per_param", "gb_per_s", "of_ceiling"]
    write_results(options.json, [*rows, *missing], columns, numel=options.numel, repeats=options.repeats)


if __name__ == "__main__":
    main()
