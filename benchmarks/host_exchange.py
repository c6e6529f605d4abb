"""A step whose gradients meet in host memory, beside one that exchanges them by collectives; CPU ranks of one machine.

    host          GeminiConfig(exchange="host")
    collective    GeminiConfig(exchange="collective"), on gloo over loopback

All processes hold both engines and train a step of one, then a step of the other, so that both find the machine alike.
Losses must be the same, bit for bit. Bytes are of all ranks together, by the engines' ledgers: `exchange_mib` of what
exchanges take, `held_mib` of everything in host memory.

Usage: python benchmarks/host_exchange.py [--ranks 2 3] [--width 1024] [--layers 8] [--rows 32] [--stage 3] [--steps 9]
    [--json PATH]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from results_file import spread_of, write_results
from torch import nn

import zero
from gemini import GeminiConfig, GeminiDDP, HybridAdam, MemoryTier

SYSTEMS = ("host", "collective")
COLUMNS = ("system", "num_ranks", "ms", "ms_min", "ms_max", "exchange_mib", "held_mib")


class Layer(nn.Module):
    """A block as large as its weights: little is computed with each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations [rows, width]."""
        return x + self.down(torch.relu(self.up(x)))


class Tower(nn.Module):
    """Layers, one after another."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(width) for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return activations [rows, width]."""
        for block in self.blocks:
            x = block(x)
        return x


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3], help="numbers of ranks")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="rows of a rank's batch")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def build(system: str, arguments: argparse.Namespace) -> tuple[GeminiDDP, HybridAdam]:
    """Return an engine and its optimizer."""
    torch.manual_seed(0)
    config = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="16GiB", num_threads=1, exchange=system)
    engine = zero.shard(Tower(arguments.width, arguments.layers), config, stage=arguments.stage)
    return engine, HybridAdam(engine.parameters(), lr=1e-3)


def held_nbytes(engine: GeminiDDP) -> tuple[int, int]:
    """Return the bytes that exchanges take, and all bytes in host memory."""
    held = engine.runtime.resources.ledger.by_purpose(MemoryTier.HOST)
    return held["exchange slots"], sum(held.values())


def run_rank(rank: int, world_size: int, arguments: argparse.Namespace, directory: str) -> None:
    """Measure on one rank; save seconds, losses and bytes by system."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store{world_size}", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    x = torch.randn(arguments.rows, arguments.width, generator=torch.Generator().manual_seed(rank))
    found: dict[str, Any] = {system: {"seconds": [], "losses": []} for system in SYSTEMS}
    with ExitStack() as stack:
        engines = {}
        for system in SYSTEMS:
            engines[system] = build(system, arguments)
            stack.enter_context(engines[system][0])
            found[system]["nbytes"] = held_nbytes(engines[system][0])
        for number in range(2 + arguments.steps):  # the first two warm up
            for system, (engine, optimizer) in engines.items():
                dist.barrier()
                start = time.perf_counter()
                loss = engine(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                dist.barrier()
                if number >= 2:
                    found[system]["seconds"].append(time.perf_counter() - start)
                found[system]["losses"].append(loss.item())
        dist.barrier()
    torch.save(found, f"{directory}/{world_size}-{rank}.pt")
    dist.destroy_process_group()


def measure(num_ranks: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each system."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            run_rank, args=(num_ranks, arguments, directory), nprocs=num_ranks
        )
        results = [torch.load(f"{directory}/{num_ranks}-{rank}.pt") for rank in range(num_ranks)]
    for result in results:
        if result["host"]["losses"] != result["collective"]["losses"]:
            raise RuntimeError(f"the losses differ: {result['host']['losses']}, {result['collective']['losses']}")
    rows = []
    for system in SYSTEMS:
        exchange, held = (sum(result[system]["nbytes"][i] for result in results) / (1 << 20) for i in range(2))
        seconds = [1000 * s for s in results[0][system]["seconds"]]
        rows.append(
            {
                "system": system,
                "num_ranks": num_ranks,
                **spread_of(seconds, "ms"),
                "exchange_mib": exchange,
                "held_mib": held,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    rows = [row for num_ranks in arguments.ranks for row in measure(num_ranks, arguments)]
    settings = {name: getattr(arguments, name) for name in ("ranks", "width", "layers", "rows", "stage", "steps")}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
