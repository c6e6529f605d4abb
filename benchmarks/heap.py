"""Peak resident memory and seconds of a training step, by what serves torch's CPU memory.

Every system trains the same model in a process of its own; the systems take turns, round by round, so that what else
happens on the machine meets all of them. Their losses must agree to the bit.

    torch                          torch's own allocator over glibc's malloc, which each of these changes in one thing:
    torch, malloc mmap 1MiB        blocks from 1 MiB on are given back to the system when they are freed
    torch, malloc mmap 256KiB      the same from 256 KiB on
    torch, malloc huge             huge pages (GLIBC_TUNABLES)
    torch, malloc 1 arena          one arena for all threads
    torch, malloc trim             malloc_trim(0) after every step
    torch, jemalloc (and others)   preloaded in glibc's place, where they are installed
    gemini                         the engine's own allocator, cpu_allocator="pool"

The time to look at is with --placement host, where no disk blurs it.

Usage: python benchmarks/heap.py --swap DIR [--model gpt2] [--rounds 3] [--json PATH]
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from resident_memory import peak_resident_nbytes
from results_file import missing_row, spread_of, write_results
from step_systems import DTYPES, SHAPES, build_model

MALLOC_VARIANTS = {
    "torch": {},
    "torch, malloc mmap 1MiB": {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
    "torch, malloc mmap 256KiB": {"MALLOC_MMAP_THRESHOLD_": str(2**18)},
    "torch, malloc huge": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "torch, malloc 1 arena": {"MALLOC_ARENA_MAX": "1"},
    "torch, malloc trim": {},
}
PRELOADED = ("jemalloc", "mimalloc", "tcmalloc")
POOL = "gemini"
PLACEMENTS = {"host": 0, "disk": 1}
SYSTEMS = (*MALLOC_VARIANTS, *(f"torch, {name}" for name in PRELOADED), POOL)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--swap", type=Path, required=True, help="directory for the swap file")
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--placement", choices=PLACEMENTS, default="disk", help="where all of the model lives")
    parser.add_argument("--rows", type=int, default=4, help="sequences in a step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round; two more come first")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--preload", nargs="*", default=[], help="NAME=FILE, where the library is not installed")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--run", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in this process and measure."""
    from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement

    torch.manual_seed(0)
    on_disk = PLACEMENTS[arguments.placement]
    config = GeminiConfig(
        device="cpu",
        dtype=DTYPES[arguments.dtype],
        nvme=NVMeConfig(path=arguments.swap, budget="64GiB"),
        placement=StaticPlacement(param_nvme=on_disk, state_nvme=on_disk, grad_nvme=on_disk),
        gradient_accumulation=False,
        cpu_allocator="pool" if arguments.run == POOL else "system",
    )
    vocabulary = SHAPES[arguments.model].get("vocab_size", 50257)
    shape = (arguments.rows, arguments.tokens)
    batch = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    seconds, losses = [], []
    with GeminiDDP(build_model(arguments.model, arguments.tokens, "meta"), config) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-4)
        for _ in range(arguments.steps + 2):
            start = time.perf_counter()
            loss = engine(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if arguments.run == "torch, malloc trim":
                ctypes.CDLL(None).malloc_trim(0)
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
    return {
        "step_s": seconds[2:],
        "peak_rss_bytes": peak_resident_nbytes(),
        "losses": losses,
    }


def environment_of(system: str, given: dict[str, str]) -> dict[str, str] | None:
    """Return the environment of a variant's process; None if the library it needs is not here."""
    name = system.removeprefix("torch, ")
    if name not in PRELOADED:
        return {**os.environ, **MALLOC_VARIANTS.get(system, {})}
    library = given.get(name) or ctypes.util.find_library({"tcmalloc": "tcmalloc_minimal"}.get(name, name))
    return None if library is None else {**os.environ, "LD_PRELOAD": library}


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every variant in turn, round by round."""
    given = dict(each.split("=", 1) for each in arguments.preload)
    environments = {system: environment_of(system, given) for system in arguments.systems}
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in arguments.systems}
    for _ in range(arguments.rounds):
        for system, environment in environments.items():
            if environment is None:
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--run", system]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            runs[system].append(json.loads(output.splitlines()[-1]))
            print(system, runs[system][-1]["peak_rss_bytes"], runs[system][-1]["step_s"], file=sys.stderr, flush=True)
    losses = {tuple(run["losses"]) for each in runs.values() for run in each}
    if len(losses) > 1:
        raise SystemExit(f"the variants' losses differ: {losses}")
    rows = []
    for system, each in runs.items():
        if not each:
            rows.append(missing_row(system, "the library is not installed; name it with --preload"))
            continue
        seconds = [second for run in each for second in run["step_s"]]
        peaks = [run["peak_rss_bytes"] for run in each]
        rows.append({"system": system, **spread_of(seconds, "step_s"), **spread_of(peaks, "peak_rss_bytes")})
    return rows


def main() -> None:
    """Run every variant, or, in a child, one."""
    arguments = parse_arguments()
    if arguments.run:
        print(json.dumps(train(arguments)))
        return
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("swap", "json", "run", "preload")
    }
    write_results(arguments.json, measure(arguments), settings=settings)


if __name__ == "__main__":
    main()
