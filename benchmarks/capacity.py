"""The largest GPT-shaped model that makes three optimizer steps inside given resident memory and the free disk.

Shapes keep the proportions of GPT-3 2.7B (Brown et al. 2020, table 2.1), with GPT-2's vocabulary: L layers, L heads of
80, a width of 80 L; so one number names a shape. The search ends where a shape does its three steps and the next larger
one does not, or has no plan:

    gemini nvme           weights, gradients and state planned into the free disk and what --ram leaves; a plan that
                          does not fit is not run, and its row says which tier lacks how much
    torch plain           torch.optim.AdamW, 16 bytes a parameter in memory
    deepspeed zero-3 nvme parameters and optimizer offloaded to the same disk

Each attempt is a process of its own; `peak_rss_bytes` is its VmHWM, imports included, and it is `ok` if that stays
within --ram over three steps. `step_s` is the median of the steps, updates included. bfloat16 takes least room; a
processor without bfloat16 instructions multiplies it a hundred times slower, so there --tokens auto takes two.

    python benchmarks/capacity.py --ram 4GiB [--swap DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capacity_run import NUM_STEPS, SYSTEMS, Attempt, gemini_config, meta_model
from resident_memory import resident_nbytes
from results_file import missing_row, write_results
from step import faster_dtype

from gemini.assembly.blueprint import Blueprint, draw_blueprint
from gemini.errors import OutOfTierMemoryError
from gemini.tiers import format_nbytes, parse_nbytes

COLUMNS = ("system", "params", "ok", "peak_rss_bytes", "step_s", "layers", "disk_bytes", "why")
NAMES = {"gemini": "gemini nvme", "plain": "torch plain", "deepspeed": "deepspeed zero-3 nvme"}
LAYERS = range(64, 3, -1)
"""From 20 B parameters to 6 M."""
PEER_BYTES_PER_PARAM = {"plain": 16, "deepspeed": 50}
"""Where the search for a peer starts; no figure comes from it. Plain: weight, gradient and two moments in float32.
DeepSpeed: what it was seen to take in main memory beside the disk."""
FEW_TOKENS, MANY_TOKENS = 2, 64


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ram", default="4GiB", help="resident memory that a system may take (%(default)s)")
    parser.add_argument("--spare-disk", default="4GiB", help="free disk that is left alone (%(default)s)")
    parser.add_argument("--swap", type=Path, help="directory on the drive to use (a temporary one here)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="working weights (%(default)s)")
    parser.add_argument("--tokens", type=int, help=f"in a step; {MANY_TOKENS}, or {FEW_TOKENS} where bf16 is slow")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument(
        "--max-layers", type=int, choices=LAYERS, default=LAYERS.start, metavar="N", help="start no larger than this"
    )
    parser.add_argument("--attempts", type=int, default=6, help="runs of each system at most")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a run counts as failed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args()


def plan_of(attempt: Attempt) -> Blueprint:
    """Return what Gemini would do for an attempt; raises OutOfTierMemoryError if it cannot."""
    return draw_blueprint(meta_model(attempt), gemini_config(attempt))


def planned_attempts(
    attempt: Attempt, shapes: Sequence[int], count: int
) -> tuple[dict[str, Any] | None, list[Attempt]]:
    """Plan from large to small, running nothing.

    Args:
        attempt: of any shape.
        shapes: numbers of layers, falling.
        count: attempts wanted.

    Returns:
        The row of the smallest shape that does not fit, None if the largest does, and the largest that fit.
    """
    refusal, fitting = None, []
    for layers in shapes:
        candidate = dataclasses.replace(attempt, layers=layers)
        try:
            plan_of(candidate)
        except OutOfTierMemoryError as error:
            refusal = row_of(candidate) | {"why": str(error).split(":")[0]}
            continue
        fitting.append(candidate)
        if len(fitting) == count:
            break
    return refusal, fitting


def search(attempts: Sequence[Attempt], start: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of attempts until one is ok and the next larger one is not.

    Args:
        attempts: from large to small.
        start: the one to begin with.
        arguments: the command line's.
    """
    made: set[int] = set()
    index = start
    while 0 <= index < len(attempts) and index not in made and len(made) < arguments.attempts:
        row = run(attempts[index], arguments.timeout)
        yield row
        made.add(index)
        index += -1 if row["ok"] else 1


def search_system(attempt: Attempt, shapes: Sequence[int], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield all rows of one system; `attempt` may be of any shape, `shapes` fall."""
    if attempt.system == "gemini":
        refusal, attempts = planned_attempts(attempt, shapes, arguments.attempts)
        if refusal is not None:
            yield refusal
        yield from search(attempts, 0, arguments)
        return
    attempts = [dataclasses.replace(attempt, layers=layers) for layers in shapes]
    room_nbytes = attempt.ram_nbytes - attempt.base_nbytes
    num_too_large = sum(each.num_params * PEER_BYTES_PER_PARAM[attempt.system] > room_nbytes for each in attempts)
    yield from search(attempts, min(num_too_large, len(attempts) - 1), arguments)


def row_of(attempt: Attempt) -> dict[str, Any]:
    """Return the row of an attempt that has not succeeded."""
    return {"system": NAMES[attempt.system], "params": attempt.num_params, "ok": False, "layers": attempt.layers}


def run(attempt: Attempt, timeout_s: float) -> dict[str, Any]:
    """Make one attempt in a child and return its row."""
    row = row_of(attempt)
    script = Path(__file__).with_name("capacity_run.py")
    try:
        done = subprocess.run(
            [sys.executable, str(script), attempt.to_json()],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return row | {"why": f"not done after {timeout_s:.0f} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return row | {"why": "killed, most likely for memory" if done.returncode == -9 else reason}
    row |= json.loads(done.stdout.strip().splitlines()[-1])
    row["ok"] = row["steps"] == NUM_STEPS and row["peak_rss_bytes"] <= attempt.ram_nbytes
    if not row["ok"]:
        row["why"] = f"stopped after {row['steps']} steps above {format_nbytes(attempt.ram_nbytes)}"
    return row


def main() -> None:
    """Search for every system in turn."""
    arguments = parse_arguments()
    tokens = arguments.tokens
    if tokens is None:
        tokens = MANY_TOKENS if arguments.dtype == "fp32" or faster_dtype() == "bf16" else FEW_TOKENS
    spare_nbytes = parse_nbytes(arguments.spare_disk, name="--spare-disk")
    shapes = [layers for layers in LAYERS if layers <= arguments.max_layers]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.swap or Path.cwd(), prefix="capacity-swap-") as swap:
        free_nbytes = shutil.disk_usage(swap).free
        attempt = Attempt(
            system="gemini",
            layers=shapes[0],
            tokens=tokens,
            dtype=arguments.dtype,
            ram_nbytes=parse_nbytes(arguments.ram, name="--ram"),
            base_nbytes=resident_nbytes(),
            disk_nbytes=max(free_nbytes - spare_nbytes, 1),
            swap=swap,
        )
        print(f"{format_nbytes(free_nbytes)} of disk are free, {tokens} tokens a step in {arguments.dtype}", flush=True)
        for system in arguments.systems:
            start = dataclasses.replace(attempt, system=system)
            for row in search_system(start, shapes, arguments):
                print({name: row.get(name) for name in COLUMNS}, flush=True)
                rows.append(row)
    for system in SYSTEMS:
        if system not in arguments.systems:
            rows.append(missing_row(NAMES[system], "not asked for"))
    settings = {name: getattr(arguments, name) for name in ("ram", "spare_disk", "dtype")}
    settings |= {"tokens": tokens, "free_disk_bytes": free_nbytes}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
