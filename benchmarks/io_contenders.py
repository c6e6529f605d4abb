"""Who is measured in io.py: the engine on each kernel interface, fio on each of its engines, DeepSpeed's aio_handle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from gemini.offload.arena import HostArena
from gemini.offload.bandwidth import IoPattern, run_pattern
from gemini.offload.io import IoBackend, IoEngine, IoOpenFlag
from gemini.offload.io_backends import explain_refusal
from gemini.tiers import TierLedger

__all__ = ["Contender", "Run", "Setting", "all_contenders", "random_memory"]

MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """How a contender is asked to do it."""

    block_nbytes: int
    depth: int
    """Blocks in the kernel at a time."""
    num_threads: int = 1
    """Of DeepSpeed's, per handle; a blocking engine takes one for each block of `depth`."""


SETTINGS = (Setting(MIB, 32), Setting(4 * MIB, 8), Setting(16 * MIB, 4))


@dataclass(frozen=True)
class Run:
    """What one run did."""

    nbytes: int
    seconds: float
    cpu_s: float
    """Processor time of all threads, user and kernel."""


class Contender(Protocol):
    """Something that can read and write a file."""

    system: str
    engine: str
    settings: tuple[Setting, ...]

    def explain_absence(self) -> str:
        """Return why it cannot be measured here; empty if it can."""

    def run(self, path: Path, pattern: IoPattern, setting: Setting, seconds: float) -> Run:
        """Run a pattern for at least `seconds` on a file that has been written."""


def all_contenders() -> list[Contender]:
    """Return everybody, whether present on this machine or not."""
    return [
        *(Gemini(backend) for backend in IoBackend),
        *(Fio(engine) for engine in ("io_uring", "libaio", "psync")),
        DeepSpeed(),
    ]


@cache
def random_memory() -> torch.Tensor:
    """Return host memory for twice the largest `depth` blocks of a setting, from where the engine takes its own."""
    nbytes = 2 * max(setting.depth * setting.block_nbytes for setting in SETTINGS)
    memory = HostArena(TierLedger({})).allocate(nbytes, "blocks")
    memory.view(-1, MIB).copy_(torch.randint(0, 256, (MIB,), dtype=torch.uint8))
    return memory


class Gemini:
    """Our engine, on one kernel interface."""

    system = "gemini"
    settings = SETTINGS

    def __init__(self, backend: IoBackend) -> None:
        self.engine = backend.value
        self._backend = backend

    def explain_absence(self) -> str:
        return explain_refusal(self._backend)

    def run(self, path: Path, pattern: IoPattern, setting: Setting, seconds: float) -> Run:
        buffers = random_memory().split(setting.block_nbytes)[: 2 * setting.depth]
        flags = IoOpenFlag.READ | IoOpenFlag.WRITE | IoOpenFlag.DIRECT
        with IoEngine(self._backend, queue_depth=setting.depth, num_threads=setting.depth) as engine:
            file = engine.open(path, flags)
            num_blocks = path.stat().st_size // setting.block_nbytes
            run = _time(lambda: run_pattern(file, pattern, buffers, num_blocks, seconds=seconds))
            stats = engine.stats()
        return Run(stats.nbytes_read + stats.nbytes_written, run.seconds, run.cpu_s)


class Fio:
    """fio with one of its engines; its own account of bytes and times.

    Its memory comes from malloc, told to use huge pages as ours does: without them fio is up to twice as slow.
    """

    system = "fio"
    settings = SETTINGS

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self._extras = ["--fixedbufs", "--registerfiles"] if engine == "io_uring" else []

    def explain_absence(self) -> str:
        return "" if shutil.which("fio") else "fio is not installed"

    def run(self, path: Path, pattern: IoPattern, setting: Setting, seconds: float) -> Run:
        num_jobs, depth = (setting.depth, 1) if self.engine == "psync" else (1, setting.depth)
        share = path.stat().st_size // num_jobs // setting.block_nbytes * setting.block_nbytes
        command = [
            "fio", "--name=io", f"--filename={path}", f"--ioengine={self.engine}",
            f"--rw={'rw' if pattern is IoPattern.MIXED else pattern.value}", "--rwmixread=50",
            f"--bs={setting.block_nbytes}", f"--iodepth={depth}", f"--numjobs={num_jobs}",
            f"--size={share}", f"--offset_increment={share}", "--direct=1", "--overwrite=1", "--scramble_buffers=0",
            "--time_based", f"--runtime={int(seconds * 1000)}ms", "--thread", "--group_reporting",
            "--output-format=json",
        ]  # fmt: skip
        huge_pages = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        finished = subprocess.run([*command, *self._extras], capture_output=True, text=True, env=huge_pages)
        if finished.returncode and self._extras:  # the limit on locked memory (ulimit -l) is too low for registering
            self._extras = []
            return self.run(path, pattern, setting, seconds)
        finished.check_returncode()
        return run_of_fio(json.loads(finished.stdout)["jobs"][0])


def run_of_fio(job: dict[str, Any]) -> Run:
    """Read fio's report of a group of jobs: percentages of the processor are of the jobs' times together."""
    directions = [job["read"], job["write"]]
    return Run(
        nbytes=sum(direction["io_bytes"] for direction in directions),
        seconds=max(direction["runtime"] for direction in directions) / 1000,
        cpu_s=(job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000,
    )


class DeepSpeed:
    """DeepSpeed's aio_handle: two of them, so that one is busy while the other is waited for."""

    system = "deepspeed"
    engine = "aio_handle"
    settings = tuple(Setting(s.block_nbytes, s.depth, threads) for s in SETTINGS for threads in (1, 4))
    build_timeout_s = 900
    """Its extension is compiled at the first use; a lock left in its build cache would make that wait for ever."""

    def explain_absence(self) -> str:
        build = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"
        command = [sys.executable, "-c", build]
        try:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=self.build_timeout_s)
        except subprocess.TimeoutExpired:
            return (
                f"its extension did not load within {self.build_timeout_s} s; look for a stale lock in its build cache"
            )
        lines = finished.stderr.strip().splitlines()
        return (lines[-1] if lines else f"exit status {finished.returncode}") if finished.returncode else ""

    def run(self, path: Path, pattern: IoPattern, setting: Setting, seconds: float) -> Run:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        handle_class = AsyncIOBuilder().load(verbose=False).aio_handle
        handles = [
            handle_class(setting.block_nbytes, setting.depth, False, True, setting.num_threads) for _ in range(2)
        ]
        operations = {
            IoPattern.READ: ("async_pread", "async_pread"),
            IoPattern.WRITE: ("async_pwrite", "async_pwrite"),
            IoPattern.MIXED: ("async_pread", "async_pwrite"),
        }[pattern]
        nbytes = setting.block_nbytes * setting.depth * setting.num_threads
        buffers = [handle.new_cpu_locked_tensor(nbytes, torch.empty(0, dtype=torch.uint8)) for handle in handles]
        num_places = path.stat().st_size // nbytes
        num_started = 0

        def start(which: int) -> None:
            nonlocal num_started
            place = num_started % num_places
            getattr(handles[which], operations[which])(buffers[which], os.fspath(path), place * nbytes)
            num_started += 1

        def work() -> None:
            end = time.perf_counter() + seconds
            start(0)
            start(1)
            while time.perf_counter() < end:
                for which in (0, 1):
                    handles[which].wait()
                    start(which)
            for handle in handles:
                handle.wait()

        run = _time(work)
        for handle, buffer in zip(handles, buffers, strict=True):
            handle.free_cpu_locked_tensor(buffer)
        return Run(num_started * nbytes, run.seconds, run.cpu_s)


def _time(work: Callable[[], object]) -> Run:
    """Run something in this process; the bytes are the caller's to say."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    work()
    return Run(0, time.perf_counter() - begin, time.process_time() - cpu_begin)
