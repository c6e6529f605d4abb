"""What it costs to commit every step, beside the same steps without, and beside saving a checkpoint each time.

    without     GeminiDDP as it is
    commits     the same with a commit file, and engine.commit after every step
    checkpoint  as `without`, and engine.save_checkpoint(wait=False) after every step, of which one is kept
    adam        one Adam pass over as many parameters in memory; `step_s` is its time
    adam, journalled  the same with a journal; the share of it that commits add to the pass

The first two engines live in one process and take turns, step by step; `ratio` is the median over the rounds of a
system's time over that of `without` (of `adam`) in the same round. `overhead_bytes` is host memory that there would not
be without commits, `attach_s` how long a second engine takes to be built on what the first has left; with --overlap
next-forward that includes the last step's updates.

Usage: python benchmarks/commits.py [--model gpt2] [--seq 256] [--rounds 6] [--disk DIR] [--dtype fp32] [--json PATH]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results_file import spread_of, write_results
from step_systems import DTYPES, LR, NUM_WARM_UPS, SHAPES, build_model

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement
from gemini.assembly.blueprint import draw_blueprint
from gemini.commits.file import CommitFile
from gemini.kernels import AdamHyper, AdamSegment, AdamTile, TileJournal, WorkerPool
from gemini.kernels.journal import BLOCK_NUMEL, SCRATCH_NBYTES
from gemini.tiers import MemoryTier

COLUMNS = ("system", "step_s", "step_s_min", "step_s_max", "ratio", "overhead_bytes", "file_bytes", "attach_s")
HYPER = AdamHyper(lr=LR, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each system")
    parser.add_argument("--overlap", default="auto", help="GeminiConfig.overlap")
    parser.add_argument("--disk", type=Path, help="keep the state on this drive")
    parser.add_argument("--checkpoints", action="store_true", help="measure checkpoints too, which takes long")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def configuration(arguments: argparse.Namespace, directory: Path) -> GeminiConfig:
    """Return the same for all."""
    nvme = None if arguments.disk is None else NVMeConfig(path=directory, budget="64GiB")
    if nvme is not None:
        directory.mkdir()
    return GeminiConfig(
        device="cpu",
        dtype=DTYPES[arguments.dtype],
        host_budget="64GiB",
        nvme=nvme,
        placement=StaticPlacement(state_nvme=0 if nvme is None else 1),
        overlap=arguments.overlap if nvme is None or arguments.overlap != "auto" else "next-forward",
        tile_numel=1 << 19,
    )


def make_step(engine: GeminiDDP, arguments: argparse.Namespace, after: Callable[[], object]) -> Callable[[], None]:
    """Return a step of training."""
    optimizer = HybridAdam(engine.parameters(), lr=LR)
    vocabulary = SHAPES[arguments.model].get("vocab_size", 50257)
    shape = (arguments.batch, arguments.seq)
    batch = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        engine(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def measure_steps(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Let the systems take turns."""

    def model() -> torch.nn.Module:
        return build_model(arguments.model, arguments.seq, "meta")

    def config(name: str) -> GeminiConfig:
        return configuration(arguments, scratch / name)

    layout = draw_blueprint(model(), config("drawn"), has_commits=True).commits
    assert layout is not None
    descriptor = os.memfd_create("commits")
    kept = config("commits")
    engines = {
        "without": GeminiDDP(model(), config("without")),
        "commits": GeminiDDP(model(), kept, commits=CommitFile.create(descriptor, layout.nbytes)),
    }
    steps = {
        "without": make_step(engines["without"], arguments, lambda: None),
        "commits": make_step(engines["commits"], arguments, engines["commits"].commit),
    }
    if arguments.checkpoints:
        saving = GeminiDDP(model(), config("checkpoint"))
        engines["checkpoint"] = saving
        steps["checkpoint"] = make_step(
            saving, arguments, lambda: saving.save_checkpoint(scratch / "saved", keep_last=1, wait=False)
        )
    seconds = take_turns(steps, arguments.rounds)
    overhead = engines["commits"].runtime.resources.ledger.by_purpose(MemoryTier.HOST)["commits"]
    for engine in engines.values():
        engine.close()
    start = time.perf_counter()
    GeminiDDP(model(), kept, commits=CommitFile.open(descriptor)).close()
    attach_s = time.perf_counter() - start
    rows = rows_of(seconds)
    rows[1] |= {"overhead_bytes": overhead, "file_bytes": layout.nbytes, "attach_s": attach_s}
    return rows


def measure_adam(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one pass with a journal and without."""
    from gemini.offload.arena import HostArena
    from gemini.tiers import TierLedger

    numel = sum(param.numel() for param in build_model(arguments.model, 64, "meta").parameters())
    arena = HostArena(TierLedger({}))
    dtype = DTYPES[arguments.dtype]

    def values(kind: torch.dtype) -> torch.Tensor:
        return arena.allocate(numel * kind.itemsize, "adam").zero_().view(kind)[:numel]

    master = values(torch.int16) if dtype is torch.bfloat16 else None
    segments = (AdamSegment(begin=0, end=numel, hyper=HYPER, step=1),)
    tile = AdamTile(values(dtype), master, values(torch.float32), values(torch.float32), values(dtype), 1.0, segments)
    tile.working.normal_(std=0.02)
    tile.grad.normal_(std=1e-3)
    done = torch.zeros(-(-numel // BLOCK_NUMEL), dtype=torch.int32)
    with WorkerPool(torch.get_num_threads()) as pool:
        scratches = torch.zeros(pool.num_threads * SCRATCH_NBYTES, dtype=torch.uint8)
        sequence = 0

        def journalled() -> None:
            nonlocal sequence
            sequence += 1
            journal = TileJournal(sequence=sequence, first_block=0, done=done, scratches=scratches)
            pool.submit_adam(tile, journal=journal).wait()

        passes = {"adam": lambda: pool.submit_adam(tile).wait(), "adam, journalled": journalled}
        return rows_of(take_turns(passes, 4 * arguments.rounds))


def take_turns(systems: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each system in each round, those that come first left out."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(NUM_WARM_UPS + rounds):
        for name, run in systems.items():
            start = time.perf_counter()
            run()
            if number >= NUM_WARM_UPS:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows_of(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return rows with ratios to the first system."""
    first = next(iter(seconds.values()))
    return [
        {
            "system": name,
            **spread_of(values, "step_s"),
            "ratio": statistics.median(value / base for value, base in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    ]


def main() -> None:
    """Measure everything."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="commits-", dir=arguments.disk) as scratch:
        rows = measure_steps(arguments, Path(scratch))
    rows += measure_adam(arguments)
    write_results(arguments.json, rows, COLUMNS, model=arguments.model)


if __name__ == "__main__":
    main()
