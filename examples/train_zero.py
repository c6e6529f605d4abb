"""Train the quickstart's model on several processes of this machine, each with a part of it:

    torchrun --nproc-per-node 2 examples/train_zero.py

Every process trains on text of its own and keeps its shard of weights, gradients and optimizer state, part of it in a
swap file. The training loop is that of one process, but for the line that wraps the model. At the end each process's
bytes are shown, tier by tier.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from lm_training import (
    ResumableSteps,
    add_checkpoint_arguments,
    add_record_argument,
    check_disk_space,
    encode,
    random_windows,
    read_stdlib,
    recorded,
    run_example,
)
from quickstart import NUM_ROWS, NUM_TOKENS, TEXT_NBYTES, TINY_TEXT_NBYTES, TINY_TILE_NUMEL, VOCAB_SIZE, build_model
from rich.console import Console
from rich.table import Table

import zero
from gemini import GeminiConfig, HybridAdam, MemoryReport, NVMeConfig
from gemini.recipe.dtype import choose_dtype
from gemini.tiers import format_nbytes

HOST_BUDGET, TINY_HOST_BUDGET = "2400MiB", "24MiB"
NVME_BUDGET_NBYTES, TINY_NVME_BUDGET_NBYTES = 3 * 2**30, 2**28


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, out=Path("runs/zero"))
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser, *, out: Path) -> None:
    """Add the options of a training run whose results go to `out` unless told otherwise."""
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (%(default)s)")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="what is sharded (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides first weights and batches (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (%(default)s)")
    parser.add_argument("--host-budget", help=f"memory for all processes together ({HOST_BUDGET})")
    parser.add_argument("--nvme", type=Path, help="directory for the swap files (OUT/swap)")
    parser.add_argument("--out", type=Path, default=out, help="where results go (%(default)s)")
    add_checkpoint_arguments(parser)
    add_record_argument(parser)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # a small model, for the tests


def encode_once(arguments: argparse.Namespace) -> torch.Tensor:
    """Return the text's tokens; the first process prepares what the others then find."""
    texts = read_stdlib(TINY_TEXT_NBYTES if arguments.tiny else TEXT_NBYTES)
    for is_mine in (dist.get_rank() == 0, dist.get_rank() != 0):
        if is_mine:
            ids = encode(texts, vocab_size=VOCAB_SIZE, cache=arguments.out)
        dist.barrier()
    return ids


def print_ranks(report: MemoryReport, console: Console) -> None:
    """Show the peak of each tier on each process."""
    peaks = {tier.tier: tier.peak_nbytes for tier in report.tiers if tier.peak_nbytes}
    everyone: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, peaks)
    table = Table("rank", *peaks, title="held by the engine at most")
    for rank, held in enumerate(everyone):
        table.add_row(str(rank), *(format_nbytes(held[tier]) for tier in peaks))
    console.print(table)


def run(console: Console, arguments: argparse.Namespace) -> None:
    """Join the other processes and train."""
    dist.init_process_group("gloo")
    train(console, arguments)
    dist.destroy_process_group()


def train(console: Console, arguments: argparse.Namespace, on_step: Callable[[float], None] | None = None) -> None:
    """Prepare, train and report, as one of the default process group's ranks.

    Args:
        console: shows what rank 0 prints.
        arguments: as from `add_options`.
        on_step: is told each step's loss, the mean over all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank != 0:
        console.file = io.StringIO()
    torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    dtype, reason = choose_dtype("fp32", torch.device("cpu"))
    ids = encode_once(arguments)
    batches = random_windows(ids, num_rows=NUM_ROWS, num_tokens=NUM_TOKENS, seed=arguments.seed * world_size + rank)
    swap = arguments.nvme or arguments.out / "swap"
    nvme_nbytes = TINY_NVME_BUDGET_NBYTES if arguments.tiny else NVME_BUDGET_NBYTES
    check_disk_space(swap, nvme_nbytes)
    config = GeminiConfig(
        device="cpu",
        dtype=dtype,
        host_budget=arguments.host_budget or (TINY_HOST_BUDGET if arguments.tiny else HOST_BUDGET),
        nvme=NVMeConfig(path=swap, budget=nvme_nbytes),
        tile_numel=TINY_TILE_NUMEL if arguments.tiny else 2**19,
        seed=arguments.seed,
    )
    console.print(f"{world_size} processes, stage {arguments.stage}; working weights: {reason}")
    with zero.shard(build_model(is_tiny=arguments.tiny), config, stage=arguments.stage) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=arguments.lr, weight_decay=0.1, max_grad_norm=1.0)
        steps = ResumableSteps(engine, arguments, console=console)
        with recorded(engine, arguments.record, console) as recorder:
            for step, batch in zip(steps, islice(batches, steps.first, None), strict=False):
                start = time.perf_counter()
                loss = engine(input_ids=batch, labels=batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if recorder is not None:
                    recorder.log(loss=loss, tokens=batch.numel())
                mean = loss.detach()
                dist.all_reduce(mean)
                console.print(
                    f"step {step + 1}: loss {mean.item() / world_size:.3f}, {time.perf_counter() - start:.2f} s"
                )
                if on_step is not None:
                    on_step(mean.item() / world_size)
        print_ranks(engine.memory_report(), console)


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(run_example(lambda console: run(console, arguments)))
