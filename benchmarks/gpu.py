"""Measure on a GPU whose memory is capped to that of a smaller card: bandwidths, a model that fits, one that does not.

    python benchmarks/gpu.py --out benchmarks/results

First copies and optimizer kernels beside the device's ceilings, and whether all placements give the same bits. Then,
for each cap, a model that plain PyTorch can hold there, trained by it and by Gemini with all optimizer state in host
memory, and the shape of Llama-7B in full fine-tuning; at the largest cap both also by DeepSpeed's ZeRO-Offload, the
second by torchao's CPUOffloadOptimizer. Steps of 16k tokens, clipping on where the system can clip. gpu_systems.py says
what the systems are, gpu_bandwidth.py what the bandwidths are, gpu_targets.py what is to be reached.

Everything together has a time limit. Cases are begun in order of their worth as long as there is time for them; one for
which too little is left becomes a row that says so, and a shorter one behind it may still be run. Each is a process of
its own, and what fails becomes a row too. Only training is held to a limit of its own, not what comes before it: a run
that is ended in its steps is slower than so many seconds a step.

`of_ceiling` is a bandwidth over that of the copy it is to be compared with; `of_torch` is tokens/s over the best
all-in-GPU run of the same model and cap, `of_deepspeed` over DeepSpeed's.

Each row is added to gpu_<device>_<date>.jsonl as soon as there is one. At the end all are in the result file,
gpu_<device>_<date>.json, and the last thing that is printed is a table of the targets, also in gpu-targets.md. A
rehearsal with --device cpu writes gpu-rehearsal_cpu_<date>, which no table takes for a measurement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_bandwidth
import torch
from children import ChildError, Said, follow_child
from environment import describe_environment
from gpu_systems import NUM_WARM_UPS, SHAPES, add_options
from gpu_targets import describe_slow, target_table
from results_file import missing_row, write_results

HERE = Path(__file__).parent
GB = 10**9
COLUMNS = (
    "task",
    "model",
    "cap_gb",
    "system",
    "tokens_per_s",
    "step_s",
    "slower_than_s",
    "setup_s",
    "peak_device_bytes",
    "peak_rss_bytes",
    "ms",
    "gb_per_s",
    "of_ceiling",
    "of_torch",
    "of_deepspeed",
    "same_bits",
)
FITTING = {10: "llama-0.4b", 16: "llama-0.7b", 24: "llama-1b"}
"""By cap in GB, a model whose 16 bytes a parameter and activations plain PyTorch can hold there."""
SLICES = {10: 8, 16: 4, 24: 2}
"""By cap in GB, in how many slices the batch passes through a block of the model that does not fit."""
NAMES = {
    "torch-autocast": "torch autocast, all on the GPU",
    "torch-bf16": "torch bf16, all on the GPU",
    "gemini-host": "gemini, state on the host",
    "gemini-stream": "gemini, all on the host",
    "gemini-auto": "gemini auto, host",
    "deepspeed-host": "deepspeed zero-2 host",
    "torchao-host": "torchao host",
}
OWN = (("fits", "torch-autocast"), ("fits", "gemini-host"), ("exceeds", "gemini-host"))
PEERS = (("fits", "deepspeed-host"), ("exceeds", "deepspeed-host"), ("exceeds", "torchao-host"))
ASIDE = (("fits", "torch-bf16"), ("fits", "gemini-stream"), ("fits", "gemini-auto"))
"""Tasks and systems: of every cap, and of the largest cap only."""
LONGEST_TRAINING_S = {"fits": 45.0, "exceeds": 90.0}
"""By task, the longest that all steps together may take, warm-ups among them."""
NEEDED_S = {"fits": 40.0, "exceeds": 110.0, "bandwidth": 20.0, "placement": 30.0, "rehearsal": 5.0}
"""By task, the time without which a case is not begun; more than it takes where all is well."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run."""

    task: str
    """"fits" or "exceeds": whether plain PyTorch can hold the model under the cap."""
    model: str
    system: str
    cap_nbytes: int
    slices: int = 1

    @property
    def label(self) -> Row:
        """What identifies its row."""
        return {"task": self.task, "model": self.model, "cap_gb": self.cap_nbytes / GB}

    def command(self, options: argparse.Namespace) -> list[str]:
        """Return the child's command."""
        command = [sys.executable, str(HERE / "gpu_systems.py"), "--system", self.system, "--model", self.model]
        command += ["--cap", str(self.cap_nbytes), "--slices", str(self.slices)]
        for name in ("device", "batch", "seq", "steps", "seconds", "swap", "host-budget"):
            value = getattr(options, name.replace("-", "_"))
            command += [] if value is None else [f"--{name}", str(value)]
        return command


def plan_runs(caps_gb: list[int], *, is_rehearsal: bool = False) -> list[Run]:
    """Return all runs, in the order in which they are to be taken as long as there is time.

    That is the largest cap, what targets are compared with first, the smallest, the caps between, and last what is only
    of interest.

    Args:
        caps_gb: caps, of those in FITTING.
        is_rehearsal: with the tiny model and without other people's programs.

    Returns:
        The runs.
    """
    largest, smallest = max(caps_gb), min(caps_gb)
    order = [(largest, OWN), (largest, PEERS), (smallest, OWN)]
    order += [(cap, OWN) for cap in sorted(caps_gb)] + [(largest, ASIDE)]
    chosen = dict.fromkeys((cap, task, system) for cap, runs in order for task, system in runs)
    return [
        make_run(cap, task, system, is_rehearsal=is_rehearsal)
        for cap, task, system in chosen
        if not (is_rehearsal and (task, system) in PEERS)
    ]


def make_run(cap_gb: int, task: str, system: str, *, is_rehearsal: bool) -> Run:
    """Return a run of one of the tasks."""
    model = FITTING[cap_gb] if task == "fits" else "llama-7b"
    slices = SLICES[cap_gb] if task == "exceeds" and system.startswith("gemini") else 1
    return Run(
        task=task,
        model="tiny" if is_rehearsal else model,
        system=system,
        cap_nbytes=cap_gb * GB,
        slices=min(slices, 2) if is_rehearsal else slices,
    )


@dataclass(frozen=True, slots=True)
class Case:
    """Something to be measured in a child."""

    name: str
    needed_s: float
    """Time without which it is not begun."""
    measure: Callable[[float], Iterator[Row]]
    """Measures it in at most so many seconds and yields its rows; raises nothing that a child has failed with."""
    left_out: Callable[[str], Row]
    """Makes the row that says why it was not begun."""


def plan_cases(options: argparse.Namespace) -> list[Case]:
    """Return everything that is to be measured, most important first."""
    is_rehearsal = options.device == "cpu"

    def script(task: str, program: str, arguments: Sequence[str]) -> Case:
        command = [sys.executable, str(HERE / program), "--device", options.device, *arguments]
        return Case(
            task,
            NEEDED_S["rehearsal" if is_rehearsal else task],
            lambda left_s: follow_script(task, command, left_s),
            lambda why: missing_row("gemini", why, task=task),
        )

    def training(run: Run) -> Case:
        return Case(
            f"{run.model}, {run.cap_nbytes / GB:g} GB, {NAMES[run.system]}",
            NEEDED_S["rehearsal" if is_rehearsal else run.task],
            lambda left_s: iter([train(run, options, left_s)]),
            lambda why: missing_row(NAMES[run.system], why, **run.label),
        )

    small = ["--numel", "8192", "--copy-bytes", "8192", "--repeats", "2"] if is_rehearsal else []
    scripts = [script("bandwidth", "gpu_bandwidth.py", small), script("placement", "gpu_placements.py", [])]
    return scripts + [training(run) for run in plan_runs(options.caps, is_rehearsal=is_rehearsal)]


def measure_all(cases: Sequence[Case], time_limit_s: float, clock: Callable[[], float]) -> Iterator[Row]:
    """Yield the rows of all cases for which there is time, and a row for each that is left out.

    Args:
        cases: in order of their worth.
        time_limit_s: seconds for all of them.
        clock: seconds, as time.monotonic.

    Yields:
        Rows, as soon as they exist.
    """
    end_s = clock() + time_limit_s
    for case in cases:
        left_s = end_s - clock()
        if left_s < case.needed_s:
            why = (
                f"left out: {max(left_s, 0):.0f} s were left of {time_limit_s:.0f}, and it may take {case.needed_s:.0f}"
            )
            yield case.left_out(why)
        else:
            yield from case.measure(left_s)


def follow_script(task: str, command: list[str], left_s: float) -> Iterator[Row]:
    """Yield the rows that a script prints, in lists or alone; what it does not come to is a row that says why."""
    try:
        for each in follow_child(command, lambda said: left_s):
            yield from each.value if isinstance(each.value, list) else [each.value]
    except ChildError as error:
        yield missing_row("gemini", str(error), task=task)


def train(run: Run, options: argparse.Namespace, left_s: float) -> Row:
    """Train one system in a child and return its row, or the row that says why there is none."""
    name = NAMES[run.system]
    longest_s = LONGEST_TRAINING_S[run.task]
    try:
        said = list(follow_child(run.command(options), partial(end_of, longest_s=longest_s, left_s=left_s)))
    except ChildError as error:
        return {**run.label, "system": name, **unfinished(error.said, error.ended_s, str(error))}
    results = [each.value for each in said if "stage" not in each.value]
    if not results:
        return missing_row(name, "ended without a result", **run.label)
    return {**run.label, "system": name, **results[-1]}


def end_of(said: Sequence[Said], *, longest_s: float, left_s: float) -> float:
    """Return the seconds after its start at which a training run is ended.

    Args:
        said: what it has said so far; see gpu_systems.py.
        longest_s: seconds for its steps.
        left_s: seconds for everything.
    """
    stages = {each.value.get("stage"): each.at_s for each in reversed(said)}  # the first of each
    if "ready" not in stages or "trained" in stages:
        return left_s
    return min(left_s, stages["ready"] + longest_s)


def unfinished(said: Sequence[Said], ended_s: float | None, why: str) -> Row:
    """Return what is known of a training run that failed or was ended.

    Args:
        said: what it had said.
        ended_s: seconds after which it was ended; None: it failed by itself.
        why: the reason.

    Returns:
        A bound of its step time, if it was ended while it trained; else the reason.
    """
    ready = [each for each in said if each.value.get("stage") == "ready"]
    setup = {"setup_s": ready[0].value["setup_s"]} if ready else {}
    if ended_s is None:
        return {**setup, "missing": why}
    if not ready:
        return {"missing": f"not set up after {ended_s:.0f} s, when the time for everything was over"}
    steps = [each.value["s"] for each in said if each.value.get("stage") == "step"]
    if len(steps) >= NUM_WARM_UPS + 1:  # the time for everything was over; what was timed counts
        timed = sorted(steps[NUM_WARM_UPS:])
        return {**setup, "missing": f"{why}; {len(timed)} timed steps, median {timed[len(timed) // 2]:.3g} s"}
    # All steps and the one that was not finished took all of the time together.
    bound = (ended_s - ready[0].at_s) / (len(steps) + 1)
    return {**setup, "slower_than_s": bound, "steps": len(steps)}


class RowLog:
    """A file of JSON lines: where the rows come from, then each row as soon as it exists.

    Args:
        path: of the file; begun anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("", encoding="utf-8")
        self.add({"environment": describe_environment()})

    def add(self, row: Row) -> None:
        """Append a row; it is on its way to the disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def compare(rows: list[Row]) -> None:
    """Add to each of our runs its tokens/s over the best of each peer's of the same task, model and cap."""
    gpu_bandwidth.compare([row for row in rows if "gb_per_s" in row])
    trained = [row for row in rows if "tokens_per_s" in row]
    for row in trained:
        alike = [other for other in trained if all(other[key] == row[key] for key in ("task", "model", "cap_gb"))]
        for name in ("torch", "deepspeed"):
            speeds = [other["tokens_per_s"] for other in alike if other["system"].split()[0] == name]
            if row["system"].startswith("gemini") and speeds:
                row[f"of_{name}"] = row["tokens_per_s"] / max(speeds)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--caps", type=int, nargs="+", choices=sorted(FITTING), default=sorted(FITTING), help="in GB")
    parser.add_argument("--time-limit", type=float, default=500.0, help="seconds for everything (%(default)s)")
    out = Path(os.environ.get("OUT", HERE / "results"))
    parser.add_argument("--out", type=Path, default=out, help="directory for the result file ($OUT, else results)")
    return parser.parse_args(arguments)


def result_path(out: Path, device: str) -> Path:
    """Return where results go, in the form that tables.py looks for."""
    date = datetime.date.today().isoformat()
    if device == "cpu":
        return out / f"gpu-rehearsal_cpu_{date}.json"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return out / f"gpu_{name}_{date}.json"


def outcome_of(row: Row) -> str:
    """Return a row's figure, or why it has none."""
    if "missing" in row:
        return str(row["missing"])
    if "slower_than_s" in row:
        return describe_slow(row)
    if "same_bits" in row:
        return "the same bits" if row["same_bits"] else "OTHER BITS"
    if "gb_per_s" in row:
        return f"{row['gb_per_s']:.3g} GB/s"
    return f"{row['tokens_per_s']:.0f} tokens/s, set up in {row['setup_s']:.0f} s"


def main() -> None:
    """Measure everything that there is time for, most important first."""
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none")
    begin_s = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    path = result_path(options.out, options.device)
    log = RowLog(path.with_suffix(".jsonl"))
    rows = []
    for row in measure_all(plan_cases(options), options.time_limit, time.monotonic):
        rows.append(row)
        log.add(row)
        what = ", ".join(str(row[key]) for key in ("task", "model", "cap_gb", "system") if key in row)
        print(f"[{time.monotonic() - begin_s:.0f} s] {what}: {outcome_of(row)}", flush=True)
    compare(rows)
    settings = {name: getattr(options, name) for name in ("batch", "seq", "steps", "seconds", "host_budget")}
    shapes = {name: SHAPES[name] for name in sorted({row["model"] for row in rows if "model" in row})}
    write_results(path, rows, COLUMNS, settings=settings, shapes=shapes)
    table = target_table(rows)
    (options.out / "gpu-targets.md").write_text(table + "\n", encoding="utf-8")
    if options.device == "cpu":
        print("\nA rehearsal: the figures mean nothing.")
    print(f"\n{time.monotonic() - begin_s:.0f} s in all\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
