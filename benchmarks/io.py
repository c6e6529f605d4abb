"""Sustained bandwidth of the disk: the engine on each kernel interface, beside fio and DeepSpeed's aio_handle.

Everybody reads, writes, and does both at once (half of the bytes each), in order of address and with O_DIRECT, on one
file whose blocks were written before: a merely reserved file would measure the file system's bookkeeping on writing and
nothing at all on reading. A short sweep finds each contender's best block size and depth for each mode; then the passes
go round all contenders in turn, so that a disk whose speed drifts treats them alike. `of_fio` is the ratio to the best
of fio's rows for that mode; all figures are medians over the passes.

    python benchmarks/io.py [--dir DIR] [--nbytes 4GiB] [--seconds 10] [--json PATH]
"""

from __future__ import annotations

import argparse
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import psutil
from io_contenders import SETTINGS, Contender, Run, Setting, all_contenders, random_memory
from results_file import missing_row, spread_of, write_results

from gemini.offload.bandwidth import IoPattern, fill_file
from gemini.offload.io import IoEngine, IoOpenFlag, choose_backend
from gemini.tiers import parse_nbytes

COLUMNS = ["system", "engine", "mode", "gb_per_s", "gb_per_s_min", "gb_per_s_max", "of_fio", "cpu_s_per_gb", "setting"]
LARGEST_BLOCK = max(setting.block_nbytes for setting in SETTINGS)
MIN_NBYTES = 256 << 20
"""DeepSpeed's largest transfer: 4 threads with 4 blocks of 16 MiB each."""


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments()
    directory = Path(tempfile.mkdtemp(prefix="gemini-io-", dir=arguments.dir))
    try:
        path = directory / "file"
        is_direct = write_file(path, arguments.nbytes)
        contenders = [each for each in all_contenders() if each.system in arguments.systems]
        absences = {each: each.explain_absence() for each in contenders}
        present = [each for each in contenders if not absences[each]]
        chosen = choose_settings(present, path, arguments.seconds / 20)
        runs = run_passes(chosen, path, arguments)
    finally:
        shutil.rmtree(directory)
    rows = [row_of(*who, chosen[who], runs[who]) for who in chosen]
    rows += [
        missing_row(each.system, why, engine=each.engine, mode=pattern.value)
        for each, why in absences.items()
        if why
        for pattern in IoPattern
    ]
    compare_with_fio(rows)
    rows.sort(key=lambda row: [pattern.value for pattern in IoPattern].index(row["mode"]))
    disk = {"nbytes": arguments.nbytes, "is_direct": is_direct, "file_system": file_system_of(arguments.dir)}
    settings = {"seconds": arguments.seconds, "passes": arguments.passes, "kernel": platform.release(), **disk}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    temporary = Path(tempfile.gettempdir())
    default = Path.cwd() if file_system_of(temporary) == "tmpfs" else temporary
    parser.add_argument("--dir", type=Path, default=default, help=f"directory on the disk to measure ({default})")
    parser.add_argument("--nbytes", default="4GiB", help="length of the test file")
    parser.add_argument("--seconds", type=float, default=10, help="time of each row, all passes together")
    parser.add_argument("--passes", type=int, default=4, help="times that every contender's turn comes")
    parser.add_argument("--systems", nargs="+", default=["gemini", "fio", "deepspeed"], help="who is measured")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    arguments.nbytes = parse_nbytes(arguments.nbytes, name="--nbytes")
    if arguments.nbytes < MIN_NBYTES:
        parser.error(f"--nbytes: expected at least {MIN_NBYTES}")
    return arguments


def file_system_of(path: Path) -> str:
    """Return the type of the file system that a directory is on."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    return next((mounts[each] for each in (path.resolve(), *path.resolve().parents) if each in mounts), "unknown")


def write_file(path: Path, nbytes: int) -> bool:
    """Give every block of the file contents; return whether that went past the page cache."""
    flags = IoOpenFlag.WRITE | IoOpenFlag.CREATE | IoOpenFlag.DIRECT
    with IoEngine(choose_backend("auto")) as engine:
        file = engine.open(path, flags)
        fill_file(file, random_memory().split(LARGEST_BLOCK), nbytes // LARGEST_BLOCK)
        return file.is_direct


Entry = tuple[Contender, IoPattern]


def choose_settings(contenders: list[Contender], path: Path, seconds: float) -> dict[Entry, Setting]:
    """Return each contender's fastest setting for each pattern, by one short run each."""

    def speed(contender: Contender, pattern: IoPattern, setting: Setting) -> float:
        run = contender.run(path, pattern, setting, seconds)
        return run.nbytes / run.seconds

    return {
        (each, pattern): max(each.settings, key=lambda setting: speed(each, pattern, setting))
        for pattern in IoPattern
        for each in contenders
    }


def run_passes(chosen: dict[Entry, Setting], path: Path, arguments: argparse.Namespace) -> dict[Entry, list[Run]]:
    """Run everybody in turn; every other pass goes backwards."""
    runs: dict[Entry, list[Run]] = {entry: [] for entry in chosen}
    for number in range(arguments.passes):
        for each, pattern in list(chosen)[:: -1 if number % 2 else 1]:
            setting = chosen[each, pattern]
            runs[each, pattern].append(each.run(path, pattern, setting, arguments.seconds / arguments.passes))
    return runs


def row_of(contender: Contender, pattern: IoPattern, setting: Setting, runs: list[Run]) -> dict[str, Any]:
    """Return a contender's row for one pattern."""
    threads = f", {setting.num_threads} threads" if setting.num_threads > 1 else ""
    return {
        "system": contender.system,
        "engine": contender.engine,
        "mode": pattern.value,
        **spread_of([run.nbytes / run.seconds / 1e9 for run in runs], "gb_per_s"),
        "cpu_s_per_gb": sum(run.cpu_s for run in runs) / sum(run.nbytes for run in runs) * 1e9,
        "seconds": sum(run.seconds for run in runs),
        "setting": f"{setting.depth} x {setting.block_nbytes >> 20} MiB{threads}",
    }


def compare_with_fio(rows: list[dict[str, Any]]) -> None:
    """Add to every measured row its ratio to the best fio row of the same mode."""
    best: dict[str, float] = {}
    for row in rows:
        if row["system"] == "fio" and "gb_per_s" in row:
            best[row["mode"]] = max(best.get(row["mode"], 0.0), row["gb_per_s"])
    for row in rows:
        if "gb_per_s" in row and row["mode"] in best:
            row["of_fio"] = row["gb_per_s"] / best[row["mode"]]


if __name__ == "__main__":
    main()
