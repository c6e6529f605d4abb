"""A training step shared out among ranks: bytes on the wire, bytes kept by each rank, resident memory, seconds.

Every system trains the same GPT-2 shape in float32 on one machine, a process per rank, on gloo over loopback: our
engine in its three stages with everything in host memory, DistributedDataParallel, FSDP2 and DeepSpeed ZeRO-3 with CPU
offload. Weights, batches and loss are the same, activation checkpointing is on; a row says so if its losses are not
those of torch. The cores of the machine are shared by the ranks, and so is the work that the loopback device makes.

`sent_bytes` is what each rank sends in a step, by the counters of the loopback device, headers included;
`of_ring` is it over what rings take (`ring_nbytes`). `state_bytes` is what a rank keeps from step to
step of weights and optimizer state; `peak_rss_bytes` the peak of its resident memory in the timed steps; of the ranks',
the largest. `ratio` is the time beside torch's with as many ranks.

    python benchmarks/zero_step.py [--ranks 1 2 4] [--model gpt2 | tiny] [--json PATH]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from children import run_child
from results_file import missing_row, write_results
from zero_systems import SYSTEMS, add_options

COLUMNS = (
    "ranks",
    "system",
    "step_s",
    "step_s_min",
    "step_s_max",
    "ratio",
    "sent_bytes",
    "of_ring",
    "state_bytes",
    "peak_rss_bytes",
)
NAMES = {
    "torch": "torch ddp",
    "gemini-1": "gemini stage 1",
    "gemini-2": "gemini stage 2",
    "gemini-3": "gemini stage 3",
    "fsdp2": "torch fsdp2, cpu offload",
    "deepspeed-3": "deepspeed zero-3, cpu offload",
}
NAMES_ALONE = {"torch": "torch plain", "gemini-3": "gemini"}
STAGES = {"torch": 0, "gemini-1": 1, "gemini-2": 2, "gemini-3": 3, "fsdp2": 3, "deepspeed-3": 3}
LOSS_TOLERANCE = 1e-4
"""Relative; systems add up in different orders."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a run counts as failed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args()


def ring_nbytes(*, stage: int, num_ranks: int, params: int, block_params: int, itemsize: int = 4) -> float:
    """Return the bytes that each rank sends in a step if every collective is a ring.

    An all-gather of n bytes takes (W - 1) / W n from each rank, a reduce-scatter as much, an all-reduce both. Up to
    stage 2 gradients are reduced and weights, or gradients, gathered: twice all parameters. Stage 3 gathers the weights
    of blocks once more, for backward; what is outside of blocks is used at both ends of a step and kept. Who still has
    the last blocks of forward when backward begins sends less.

    Args:
        stage: 0 for replicas, or of ZeRO.
        num_ranks: W.
        params: of the model.
        block_params: those of them that belong to blocks.
        itemsize: bytes of a weight, and of a gradient.

    Source: Rajbhandari et al. 2020 (ZeRO), section 7; rings: Patarasuk & Yuan 2009.
    """
    exchanged = 2 * params + (block_params if stage == 3 else 0)
    return (num_ranks - 1) / num_ranks * exchanged * itemsize


def run(system: str, num_ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one system and return its row, or the row that says why there is none."""
    names = NAMES_ALONE if num_ranks == 1 else {}
    row = {"ranks": num_ranks, "system": names.get(system, NAMES[system])}
    options = {name: getattr(arguments, name) for name in ("model", "batch", "seq", "steps")}
    command = [sys.executable, str(Path(__file__).parent / "zero_systems.py"), "--system", system]
    command += [
        "--ranks",
        str(num_ranks),
        *(text for name, value in options.items() for text in (f"--{name}", str(value))),
    ]
    try:
        row |= run_child(command, arguments.timeout)
    except RuntimeError as error:
        return missing_row(row.pop("system"), str(error), **row)
    row["ring_bytes"] = ring_nbytes(
        stage=STAGES[system], num_ranks=num_ranks, params=row["params"], block_params=row["block_params"]
    )
    if num_ranks > 1:
        row["of_ring"] = row["sent_bytes"] / row["ring_bytes"]
    return row


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its time beside torch's with as many ranks; note losses that are not torch's."""
    references = {row["ranks"]: row for row in rows if row["system"] in ("torch ddp", "torch plain")}
    for row in rows:
        reference = references.get(row["ranks"], {})
        if "step_s" not in row or "step_s" not in reference:
            continue
        row["ratio"] = row["step_s"] / reference["step_s"]
        pairs = zip(row["losses"], reference["losses"], strict=True)
        if not all(math.isclose(*pair, rel_tol=LOSS_TOLERANCE) for pair in pairs):
            row["missing"] = f"its losses are not torch's: {row['losses']}"


def main() -> None:
    """Run every system with every number of ranks; with one rank the stages are the same."""
    arguments = parse_arguments()
    rows = []
    for num_ranks in arguments.ranks:
        for system in arguments.systems:
            if num_ranks == 1 and STAGES[system] in (1, 2):
                continue
            rows.append(run(system, num_ranks, arguments))
            row = rows[-1]
            print(f"{num_ranks} ranks, {row['system']}: {row.get('step_s', row.get('missing'))}", flush=True)
    compare(rows)
    settings = {name: getattr(arguments, name) for name in ("model", "batch", "seq", "steps")}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
