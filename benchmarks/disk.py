"""Bandwidth of each I/O backend on one directory, beside fio where it is installed.

Every backend reads, overwrites and mixes reads and writes in order of address, with O_DIRECT where the file system
takes it, on a file whose blocks were written before: a merely reserved file would measure the file system's
bookkeeping on writing and nothing at all on reading. Repetitions are interleaved over the backends, so that a disk
whose speed drifts treats them alike; the median and the extremes are reported.

    python benchmarks/disk.py --dir /mnt/nvme --nbytes 8GiB --json disk.json
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import describe_environment

from gemini.offload.io import (
    IoBackend,
    IoEngine,
    IoFile,
    IoOpenFlag,
    IoOperation,
    IoRequest,
    IoTicket,
    available_backends,
    empty_aligned,
)
from gemini.tiers import format_nbytes, parse_nbytes

PATTERNS = ("write", "read", "mixed")
FIO_PATTERNS = {"write": "write", "read": "read", "mixed": "rw"}


def operation_of(pattern: str, index: int) -> IoOperation:
    """Return what a pattern does with its record number `index`: "mixed" alternates."""
    if pattern == "mixed":
        return IoOperation.READ if index % 2 == 0 else IoOperation.WRITE
    return IoOperation(pattern)


def move_all(engine: IoEngine, file: IoFile, pattern: str, buffers: list[torch.Tensor], nbytes: int) -> float:
    """Run one pattern over the file with all buffers in flight; returns bytes per second."""
    record_nbytes = buffers[0].numel()
    under_way: collections.deque[IoTicket] = collections.deque()
    begin = time.perf_counter()
    for index in range(nbytes // record_nbytes):
        if len(under_way) == len(buffers):
            under_way.popleft().wait()
        request = IoRequest(
            file=file,
            operation=operation_of(pattern, index),
            buffer=buffers[index % len(buffers)],
            offset=index * record_nbytes,
        )
        under_way.extend(engine.submit([request]))
    for ticket in under_way:
        ticket.wait()
    return nbytes / (time.perf_counter() - begin)


def measure_backend(path: Path, backend: IoBackend, record_nbytes: int, nbytes: int, depth: int) -> dict[str, float]:
    """Return bytes per second of each pattern."""
    buffers = [empty_aligned(record_nbytes, torch.uint8).random_(0, 256) for _ in range(depth)]
    flags = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.DIRECT
    with IoEngine(backend, queue_depth=depth, num_threads=depth) as engine:
        file = engine.open(path, flags)
        speeds = {pattern: move_all(engine, file, pattern, buffers, nbytes) for pattern in PATTERNS}
        if not file.is_direct:
            print(f"note: {path.parent} does not take O_DIRECT; these are page cache numbers", file=sys.stderr)
    return speeds


def measure_fio(path: Path, record_nbytes: int, nbytes: int, depth: int, *, ioengine: str) -> dict[str, float]:
    """Return bytes per second of each pattern as fio sees them."""
    speeds = {}
    for pattern, fio_pattern in FIO_PATTERNS.items():
        command = [
            "fio",
            "--name=disk",
            f"--filename={path}",
            f"--rw={fio_pattern}",
            f"--bs={record_nbytes}",
            f"--size={nbytes}",
            f"--iodepth={depth}",
            f"--ioengine={ioengine}",
            "--direct=1",
            "--overwrite=1",
            "--output-format=json",
        ]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(finished.stdout)["jobs"][0]
        speeds[pattern] = float(job["read"]["bw_bytes"] + job["write"]["bw_bytes"])
    return speeds


def write_file(path: Path, nbytes: int) -> None:
    """Give every block of the file contents."""
    block = torch.randint(0, 256, (4 << 20,), dtype=torch.uint8).numpy().tobytes()
    with open(path, "wb") as file:
        for start in range(0, nbytes, len(block)):
            file.write(block[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()), help="directory on the disk to measure"
    )
    parser.add_argument("--nbytes", default="1GiB", help="length of the test file")
    parser.add_argument("--records", nargs="+", default=["4MiB", "12MiB"], help="bytes in one transfer")
    parser.add_argument("--depth", type=int, default=8, help="transfers in flight")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments()
    nbytes = parse_nbytes(arguments.nbytes, name="--nbytes")
    path = Path(tempfile.mkdtemp(prefix="gemini-disk-", dir=arguments.dir)) / "file"
    speeds: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    try:
        write_file(path, nbytes)
        for record in arguments.records:
            record_nbytes = parse_nbytes(record, name="--records")
            for _ in range(arguments.repeats):
                for backend in available_backends():
                    measured = measure_backend(path, backend, record_nbytes, nbytes, arguments.depth)
                    for pattern, speed in measured.items():
                        speeds[record, backend.value, pattern].append(speed)
                if shutil.which("fio"):
                    measured = measure_fio(path, record_nbytes, nbytes, arguments.depth, ioengine="io_uring")
                    for pattern, speed in measured.items():
                        speeds[record, "fio io_uring", pattern].append(speed)
    finally:
        shutil.rmtree(path.parent)
    report(speeds, nbytes, arguments)


def report(speeds: dict[tuple[str, str, str], list[float]], nbytes: int, arguments: argparse.Namespace) -> None:
    """Print a table, and write the numbers if a file was named."""
    print(f"{format_nbytes(nbytes)} file in {arguments.dir}, {arguments.depth} transfers in flight, GB/s (10^9 bytes)")
    print(f"{'record':>8}  {'backend':<13} {'pattern':<8} {'median':>7} {'lowest':>7} {'highest':>7}")
    rows = []
    for (record, backend, pattern), values in speeds.items():
        median, low, high = (value / 1e9 for value in (statistics.median(values), min(values), max(values)))
        print(f"{record:>8}  {backend:<13} {pattern:<8} {median:7.2f} {low:7.2f} {high:7.2f}")
        rows.append({"record": record, "backend": backend, "pattern": pattern, "bytes_per_s": values})
    if arguments.json:
        environment = describe_environment() | {"kernel": platform.release()}
        content = {"environment": environment, "nbytes": nbytes, "depth": arguments.depth, "results": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
