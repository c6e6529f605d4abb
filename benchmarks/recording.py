"""What it costs to record: the same training step with nobody recording, with one line a step, and with every move.

A model whose weights and state are on disk, so that a step has as many moves as it can have. The three take turns, step
by step, in one process; a step is timed from the start of forward until its updates have ended. How many events one
step has, and how many bytes they take in the recording, is counted.

    python benchmarks/recording.py [--layers N] [--width N] [--rounds N] [--swap DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from results_file import spread_of, write_results

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement

COLUMNS = ("system", "step_s", "step_s_min", "step_s_max", "ratio", "events", "nbytes")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind")
    parser.add_argument("--swap", type=Path, default=Path.cwd(), help="directory on the disk to use")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args()


def make_engine(arguments: argparse.Namespace, directory: Path) -> GeminiDDP:
    """Wrap a transformer's blocks; everything that can be on disk is."""
    torch.manual_seed(0)
    blocks = [
        torch.nn.TransformerEncoderLayer(
            arguments.width, arguments.width // 64, 4 * arguments.width, dropout=0.0, batch_first=True
        )
        for _ in range(arguments.layers)
    ]
    config = GeminiConfig(
        device="cpu",
        dtype=torch.float32,
        nvme=NVMeConfig(path=directory, budget="8GiB"),
        placement=StaticPlacement(param_nvme=1, state_nvme=1),
    )
    return GeminiDDP(torch.nn.Sequential(*blocks), config)


def timed_step(
    engine: GeminiDDP, optimizer: HybridAdam, batch: torch.Tensor, how: AbstractContextManager[Any]
) -> float:
    """Train one step inside a context and return its seconds, the context's own not counted."""
    with how:
        start = time.perf_counter()
        engine(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.runtime.finish_updates()
        return time.perf_counter() - start


def main() -> None:
    """Take turns."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.swap, prefix="recording-swap-") as name:
        directory = Path(name)
        kinds = {"nobody records": None, "a line a step": (), "every move": (0,)}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        with make_engine(arguments, directory) as engine:
            optimizer = HybridAdam(engine.parameters(), lr=1e-4)
            batch = torch.randn(8, 128, arguments.width)
            for number in range(arguments.rounds + 2):
                for kind, steps in kinds.items():
                    how = nullcontext() if steps is None else engine.record(directory / kind, steps=steps)
                    elapsed_s = timed_step(engine, optimizer, batch, how)
                    if number >= 2:  # the first steps touch memory and learn the order
                        seconds[kind].append(elapsed_s)
        reference = statistics.median(seconds["nobody records"])
        rows = []
        for kind, values in seconds.items():
            row: dict[str, Any] = {"system": kind, **spread_of(values, "step_s")}
            row["ratio"] = statistics.median(values) / reference
            if kinds[kind] is not None:
                lines = (directory / kind / "rank0.jsonl").read_bytes().splitlines(keepends=True)[1:]
                row |= {"events": len(lines), "nbytes": sum(map(len, lines))}
            rows.append(row)
    settings = {key: getattr(arguments, key) for key in ("layers", "width", "rounds")}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
