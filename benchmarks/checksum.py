"""What verifying costs: CRC-32C beside zlib's CRC-32 and the memory behind them, a verified file beside a plain one.

Checksums run in one thread over memory larger than the caches; the ceiling is one thread of the worker pool that reads
the same bytes and does nothing with them. Files are written and read with O_DIRECT in order of address, as a step does;
`cpu_s_per_gb` is the processor time of the whole process. All figures are medians over the passes, which take turns.

    python benchmarks/checksum.py [--dir DIR] [--nbytes 1GiB] [--passes 5] [--json PATH]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results_file import spread_of, write_results

from gemini.kernels.pool import WorkerPool
from gemini.offload.checksum import CrcMethod, crc32c
from gemini.offload.io import IoEngine, IoFile, IoOpenFlag, IoOperation, IoRequest, choose_backend, empty_aligned
from gemini.tiers import parse_nbytes

COLUMNS = ["system", "what", "gb_per_s", "gb_per_s_min", "gb_per_s_max", "cpu_s_per_gb"]
BLOCK_NBYTES = 4 << 20
QUEUE_DEPTH = 8


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="directory on the disk to measure (here)")
    parser.add_argument("--nbytes", default="1GiB", help="length of memory and file")
    parser.add_argument("--passes", type=int, default=5, help="times that each turn comes")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    nbytes = parse_nbytes(arguments.nbytes, name="--nbytes") // BLOCK_NBYTES * BLOCK_NBYTES
    torch.set_num_threads(1)
    memory = empty_aligned(nbytes, torch.uint8).random_(0, 256)
    with WorkerPool(1) as pool:
        rows = measure(memory_turns(memory, pool), nbytes, arguments.passes)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory, IoEngine(choose_backend("auto")) as engine:
        rows += measure(file_turns(memory, engine, Path(directory)), nbytes, arguments.passes)
    settings = {"nbytes": nbytes, "passes": arguments.passes, "block_nbytes": BLOCK_NBYTES, "queue_depth": QUEUE_DEPTH}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


def memory_turns(memory: torch.Tensor, pool: WorkerPool) -> dict[tuple[str, str], Callable[[], object]]:
    """Return who computes over memory."""
    return {
        ("ceiling", "read memory, one thread"): lambda: pool.submit_sweep([memory], []).checksum(),
        ("gemini", "CRC-32C, the processor's instruction"): lambda: crc32c(memory),
        ("gemini", "CRC-32C, portable"): lambda: crc32c(memory, method=CrcMethod.PORTABLE),
        ("zlib", "CRC-32"): lambda: zlib.crc32(memory.numpy()),
    }


def file_turns(memory: torch.Tensor, engine: IoEngine, directory: Path) -> dict[tuple[str, str], Callable[[], object]]:
    """Return writes and reads of a plain and a verified file; both are written before anything is measured."""
    turns: dict[tuple[str, str], Callable[[], object]] = {}
    for what in ("plain", "verified"):
        flags = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.CREATE | IoOpenFlag.DIRECT
        file = engine.open(directory / what, flags)
        if what == "verified":
            file.verify(memory.numel())
        move(engine, file, IoOperation.WRITE, memory)
        for operation in (IoOperation.WRITE, IoOperation.READ):
            turns["gemini", f"{operation.value}, {what}"] = lambda f=file, o=operation: move(engine, f, o, memory)  # type: ignore[misc]
    return turns


def move(engine: IoEngine, file: IoFile, operation: IoOperation, memory: torch.Tensor) -> None:
    """Transfer all of memory, a few blocks at a time."""
    tickets = []
    for begin in range(0, memory.numel(), BLOCK_NBYTES):
        if len(tickets) >= QUEUE_DEPTH:
            tickets.pop(0).wait()
        buffer = memory[begin : begin + BLOCK_NBYTES]
        tickets += engine.submit([IoRequest(file=file, operation=operation, buffer=buffer, offset=begin)])
    for ticket in tickets:
        ticket.wait()


def measure(turns: dict[tuple[str, str], Callable[[], object]], nbytes: int, passes: int) -> list[dict[str, Any]]:
    """Let everybody have as many turns, one after the other; return a row for each."""
    seconds: dict[tuple[str, str], list[float]] = {who: [] for who in turns}
    cpu_seconds = dict.fromkeys(turns, 0.0)
    for _ in range(passes):
        for who, turn in turns.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            turn()
            seconds[who].append(time.perf_counter() - start)
            cpu_seconds[who] += time.process_time() - cpu_start
    return [
        {
            "system": system,
            "what": what,
            **spread_of([nbytes / 1e9 / each for each in seconds[system, what]], "gb_per_s"),
            "cpu_s_per_gb": cpu_seconds[system, what] / (nbytes / 1e9 * passes),
        }
        for system, what in turns
    ]


if __name__ == "__main__":
    main()
