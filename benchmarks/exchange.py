"""Ways of bringing each rank the mean of its shard of a gradient, on gloo over loopback, one process per rank.

    gemini                  what training does: all-to-all in bfloat16, then a sum in float32 in rank order
    all-to-all              its bytes on the wire alone
    reduce-scatter bf16     torch's collective, which sums on the way in bfloat16
    reduce-scatter fp32     the same in float32, after a conversion: as exact, in whatever order the backend likes

Usage: python benchmarks/exchange.py [--ranks 2 3 4] [--numel 4194304] [--repeats 7] [--json PATH]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from results_file import spread_of, write_results

from gemini.gradients.exchange import mean_of_sum
from gemini.gradients.replica_sums import sum_of_parts

COLUMNS = ("system", "num_ranks", "ms", "ms_min", "ms_max")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="numbers of ranks")
    parser.add_argument("--numel", type=int, default=1 << 22, help="elements of a shard")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def systems(numel: int) -> dict[str, Callable[[], object]]:
    """Return what is measured, each a call that blocks."""
    world_size = dist.get_world_size()
    sent = torch.randn(world_size * numel).to(torch.bfloat16)
    received = torch.empty_like(sent)
    shard = torch.empty(numel, dtype=torch.bfloat16)
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def exchange() -> None:
        dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8))

    def exchange_and_add() -> torch.Tensor:
        exchange()
        return mean_of_sum(sum_of_parts(received.view(world_size, numel)), world_size, received.dtype)

    def reduce_in_float32() -> torch.Tensor:
        total = torch.empty(numel)
        reduce_scatter(total, sent.to(torch.float32))
        return total.div_(world_size).to(torch.bfloat16)

    return {
        "gemini": exchange_and_add,
        "all-to-all": exchange,
        "reduce-scatter bf16": lambda: reduce_scatter(shard, sent),
        "reduce-scatter fp32": reduce_in_float32,
    }


def run_rank(rank: int, world_size: int, numel: int, repeats: int, directory: str) -> None:
    """Measure on one rank; rank 0 saves seconds by system."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store{world_size}", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    seconds: dict[str, list[float]] = {}
    for name, call in systems(numel).items():
        call()  # warms up
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    if rank == 0:
        torch.save(seconds, f"{directory}/seconds{world_size}.pt")
    dist.destroy_process_group()


def measure(num_ranks: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each system."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            run_rank, args=(num_ranks, arguments.numel, arguments.repeats, directory), nprocs=num_ranks
        )
        seconds = torch.load(f"{directory}/seconds{num_ranks}.pt")
    return [
        {"system": name, "num_ranks": num_ranks, **spread_of([1000 * s for s in values], "ms")}
        for name, values in seconds.items()
    ]


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    rows = [row for num_ranks in arguments.ranks for row in measure(num_ranks, arguments)]
    settings = {"ranks": arguments.ranks, "numel": arguments.numel, "repeats": arguments.repeats}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
