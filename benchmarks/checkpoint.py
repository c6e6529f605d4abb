"""Seconds and memory of saving and loading a training checkpoint, beside the drive and what torch has for it.

Every system keeps the same: of each parameter 12 bytes, master and two moments, and brings them to the drive (fsync).
Each runs in a process of its own; they take turns, round by round. Files are dropped from the page cache before they
are loaded.

    drive          sequential transfers of 4 MiB past the page cache, as many bytes: the ceiling
    gemini host    an engine whose state lives in host memory
    gemini nvme    an engine whose state lives in a swap file on the same drive, which has to be read or written as well
    torch.save     a dictionary of tensors that are all in memory; torch.load makes them anew
    dcp            the same with torch.distributed.checkpoint, by one process; loads into the tensors there are

`returns_s` is how long save_checkpoint(wait=False) keeps the caller; training may go on then. Loading with gemini reads
everything twice, checksums first; `load_unverified_s` is without. Memory is the peak while saving or loading above what
was resident before.

Usage: python benchmarks/checkpoint.py --dir DIR [--model gpt2-medium] [--rounds 3] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resident_memory import forget_peak, peak_resident_nbytes, resident_nbytes
from results_file import missing_row, spread_of, write_results
from step_systems import SHAPES, build_model

BLOCK_NBYTES = 4 << 20
COLUMNS = (
    "system",
    "bytes",
    "save_s",
    "save_gbs",
    "returns_s",
    "save_rss_bytes",
    "load_s",
    "load_gbs",
    "load_unverified_s",
    "load_rss_bytes",
)
Numbers = dict[str, float]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dir", type=Path, required=True, help="directory on the drive to be measured")
    parser.add_argument("--model", choices=SHAPES, default="gpt2-medium")
    parser.add_argument("--rounds", type=int, default=3, help="processes per system")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--run", choices=SYSTEMS, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- what is measured, each in a process of its own


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Return seconds, and bytes of resident memory at the peak above those from before."""
    before = resident_nbytes()
    forget_peak()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, max(0, peak_resident_nbytes() - before)


def files_in(directory: Path) -> list[Path]:
    """Return all files below a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


def settle(directory: Path) -> None:
    """Bring files to the drive and drop them from the page cache."""
    for path in files_in(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_drive(directory: Path, model: str) -> Numbers:
    """Write and read as many bytes as the others, past the page cache."""
    nbytes = 12 * sum(param.numel() for param in build_model(model, 32, "meta").parameters())
    block = mmap.mmap(-1, BLOCK_NBYTES)
    block.write(os.urandom(BLOCK_NBYTES))
    count = nbytes // BLOCK_NBYTES

    def transfer(flags: int, move: Callable[[int], object]) -> None:
        file = os.open(directory / "blocks", flags | os.O_DIRECT, 0o600)
        for _ in range(count):
            move(file)
        os.fsync(file)
        os.close(file)

    save_s, _ = timed(lambda: transfer(os.O_WRONLY | os.O_CREAT, lambda file: os.write(file, block)))
    load_s, _ = timed(lambda: transfer(os.O_RDONLY, lambda file: os.readv(file, [block])))
    return {"bytes": count * BLOCK_NBYTES, "save_s": save_s, "load_s": load_s}


def measure_gemini(directory: Path, model: str, *, on_disk: float) -> Numbers:
    """Save an engine after a step, and load it twice."""
    from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement

    (directory / "swap").mkdir()
    config = GeminiConfig(
        device="cpu",
        dtype=torch.float32,
        nvme=NVMeConfig(path=directory / "swap", budget="64GiB"),
        placement=StaticPlacement(param_nvme=on_disk, state_nvme=on_disk, grad_nvme=on_disk),
        overlap="off",
    )
    vocabulary = SHAPES[model].get("vocab_size", 50257)
    batch = torch.randint(0, vocabulary, (1, 32), generator=torch.Generator().manual_seed(1))
    with GeminiDDP(build_model(model, 32, "meta"), config) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-4)
        engine(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        engine.runtime.finish_updates()
        returns_s = 0.0

        def save() -> None:
            nonlocal returns_s
            start = time.perf_counter()
            pending = engine.save_checkpoint(directory / "saved", wait=False)
            returns_s = time.perf_counter() - start
            pending.wait()

        def load(verify: bool) -> tuple[float, int]:
            settle(directory / "saved")
            return timed(lambda: engine.load_checkpoint(directory / "saved", verify=verify))

        save_s, save_rss = timed(save)
        load_s, load_rss = load(verify=True)
        load_unverified_s, _ = load(verify=False)
    nbytes = sum(path.stat().st_size for path in files_in(directory / "saved"))
    return {
        "bytes": nbytes, "save_s": save_s, "returns_s": returns_s, "save_rss_bytes": save_rss, "load_s": load_s,
        "load_unverified_s": load_unverified_s, "load_rss_bytes": load_rss,
    }  # fmt: skip


def state_in_memory(model: str) -> dict[str, torch.Tensor]:
    """Return masters and moments as plain training has them."""
    generator = torch.Generator().manual_seed(0)
    params = dict(build_model(model, 32, "meta").named_parameters())
    return {
        f"{kind}.{name}": torch.randn(param.shape, generator=generator)
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name, param in params.items()
    }


def measure_torch(directory: Path, model: str) -> Numbers:
    """Save and load a dictionary with torch.save."""
    state = state_in_memory(model)
    path = directory / "saved.pt"

    def save() -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    save_s, save_rss = timed(save)
    settle(directory)
    load_s, load_rss = timed(lambda: torch.load(path))
    return {
        "bytes": path.stat().st_size, "save_s": save_s, "save_rss_bytes": save_rss, "load_s": load_s,
        "load_rss_bytes": load_rss,
    }  # fmt: skip


def measure_dcp(directory: Path, model: str) -> Numbers:
    """Save and load a dictionary with torch.distributed.checkpoint."""
    import warnings

    import torch.distributed.checkpoint as dcp

    warnings.simplefilter("ignore")  # it says that there is one process
    state = state_in_memory(model)
    save_s, save_rss = timed(lambda: dcp.save(state, checkpoint_id=directory / "saved", no_dist=True))
    settle(directory)
    load_s, load_rss = timed(lambda: dcp.load(state, checkpoint_id=directory / "saved", no_dist=True))
    nbytes = sum(path.stat().st_size for path in files_in(directory))
    return {
        "bytes": nbytes, "save_s": save_s, "save_rss_bytes": save_rss, "load_s": load_s, "load_rss_bytes": load_rss
    }  # fmt: skip


SYSTEMS: dict[str, Callable[[Path, str], Numbers]] = {
    "drive": measure_drive,
    "gemini host": lambda directory, model: measure_gemini(directory, model, on_disk=0.0),
    "gemini nvme": lambda directory, model: measure_gemini(directory, model, on_disk=1.0),
    "torch.save": measure_torch,
    "dcp": measure_dcp,
}


# ---------------------------------------------------------------- all of them in turn


def run_in_process(system: str, arguments: argparse.Namespace) -> Numbers | str:
    """Measure a system in a process of its own; return why not if it fails."""
    command = [sys.executable, __file__, "--dir", str(arguments.dir), "--model", arguments.model, "--run", system]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {done.returncode}"
    numbers: Numbers = json.loads(done.stdout.splitlines()[-1])
    return numbers


def row_of(system: str, runs: list[Numbers | str]) -> dict[str, Any]:
    """Return medians and extremes of a system's runs."""
    good = [run for run in runs if not isinstance(run, str)]
    if not good:
        return missing_row(system, str(runs[0]))
    row: dict[str, Any] = {"system": system, "bytes": good[0]["bytes"]}
    for name in good[0]:
        if name.endswith("_s"):
            row |= spread_of([run[name] for run in good], name)
        elif name != "bytes":
            row[name] = max(run[name] for run in good)
    return row | {f"{name}_gbs": row["bytes"] / 1e9 / row[f"{name}_s"] for name in ("save", "load")}


def main() -> None:
    """Measure all systems, round by round."""
    arguments = parse_arguments()
    if arguments.run is not None:
        directory = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.dir))
        try:
            print(json.dumps(SYSTEMS[arguments.run](directory, arguments.model)))
        finally:
            shutil.rmtree(directory)
        return
    runs: dict[str, list[Numbers | str]] = {system: [] for system in arguments.systems}
    for _ in range(arguments.rounds):
        for system in arguments.systems:
            runs[system].append(run_in_process(system, arguments))
    rows = [row_of(system, runs[system]) for system in arguments.systems]
    write_results(arguments.json, rows, COLUMNS, model=arguments.model)


if __name__ == "__main__":
    main()
