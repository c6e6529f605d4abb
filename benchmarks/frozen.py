"""Frozen weights of ranks on one machine: one copy that all use, beside shards that are gathered for every use.

Each rank trains adapters of rank 8 beside frozen linear layers, in host memory, on gloo over loopback.

    shared      share_frozen=True
    gathered    share_frozen=False
    copies      plain PyTorch: every rank has all weights, no rank exchanges anything, which bounds the step from below

Bytes are of all ranks together (Pss: what is common counts once), less what the same processes took before the model.

Usage: python benchmarks/frozen.py [--ranks 2 3] [--width 2048] [--layers 24] [--rows 64] [--steps 7] [--json PATH]
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from results_file import spread_of, write_results
from torch import nn

import zero
from gemini import GeminiConfig, HybridAdam

SYSTEMS = ("shared", "gathered", "copies")
COLUMNS = ("system", "num_ranks", "ms", "ms_min", "ms_max", "mib", "frozen_mib")


class Adapted(nn.Module):
    """Frozen linear layers, each with a trained update of low rank."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdaptedLayer(width) for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations [rows, width]."""
        for block in self.blocks:
            x = block(x)
        return x


class AdaptedLayer(nn.Module):
    """One of them."""

    def __init__(self, width: int, rank: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations [rows, width]."""
        return x + torch.tanh(self.base(x) + self.up(self.down(x)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=64, help="rows of a rank's batch")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


@contextmanager
def training(system: str, arguments: argparse.Namespace) -> Iterator[Callable[[], None]]:
    """Yield what trains one step."""
    torch.manual_seed(0)
    model = Adapted(arguments.width, arguments.layers)
    x = torch.randn(arguments.rows, arguments.width)

    def step(call: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if system == "copies":
        adamw = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
        yield lambda: step(model, adamw)
        return
    config = GeminiConfig(
        device="cpu",
        dtype=torch.float32,
        host_budget="8GiB",
        num_threads=1,
        share_frozen=system == "shared",
    )
    with zero.shard(model, config) as engine:
        adam = HybridAdam(engine.parameters())
        yield lambda: step(engine, adam)


def proportional_nbytes() -> int:
    """Return this process's part of the memory it uses."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def run_rank(rank: int, world_size: int, arguments: argparse.Namespace, system: str, directory: str) -> None:
    """Measure one system on one rank; save seconds of steps and bytes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store{world_size}{system}", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    seconds = []
    dist.barrier()
    before_nbytes = proportional_nbytes()
    dist.barrier()
    with training(system, arguments) as step:
        for _ in range(2):
            step()  # warms up
        for _ in range(arguments.steps):
            dist.barrier()
            start = time.perf_counter()
            step()
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        nbytes = proportional_nbytes() - before_nbytes
        dist.barrier()
    torch.save((seconds, nbytes), f"{directory}/{world_size}{system}{rank}.pt")
    dist.destroy_process_group()


def measure(system: str, num_ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a system's row."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            run_rank, args=(num_ranks, arguments, system, directory), nprocs=num_ranks
        )
        results = [torch.load(f"{directory}/{num_ranks}{system}{rank}.pt") for rank in range(num_ranks)]
    return {
        "system": system,
        "num_ranks": num_ranks,
        **spread_of([1000 * s for s in results[0][0]], "ms"),
        "mib": sum(nbytes for _, nbytes in results) / (1 << 20),
        "frozen_mib": arguments.layers * (arguments.width + 1) * arguments.width * 4 / (1 << 20),
    }


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    rows = [measure(system, num_ranks, arguments) for num_ranks in arguments.ranks for system in SYSTEMS]
    settings = {name: getattr(arguments, name) for name in ("ranks", "width", "layers", "rows", "steps")}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
