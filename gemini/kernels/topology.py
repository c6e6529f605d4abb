"""Placement of worker threads on processors and of host buffers on memory nodes.

Decisions are pure functions on numbers; the machine is read from Linux's /sys and /proc, and elsewhere is unknown.
Placement is a request: if the system refuses it or tells nothing, the default stays, and no result depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemini._native import ffi, lib

__all__ = [
    "MachineTopology",
    "choose_num_workers",
    "choose_worker_cpus",
    "interleave_memory",
    "parse_cpu_list",
    "read_launching_core",
    "read_num_cores",
    "read_topology",
]

MAX_WORKERS = 16
"""Most threads an engine takes of its own accord."""
SYSFS_CPU_DIR = Path("/sys/devices/system/cpu")
SYSFS_NODE_DIR = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineTopology:
    """The processors and memory nodes this process may use."""

    cpus: frozenset[int]
    """Logical processors in this process's affinity mask."""
    nodes: tuple[tuple[int, frozenset[int]], ...]
    """Pairs of node number and usable processors of the node, none of them empty; () if unknown."""


def parse_cpu_list(text: str) -> frozenset[int]:
    """Return the numbers that a kernel list names: "0-2,8" is {0, 1, 2, 8}.

    Args:
        text: ranges and numbers, separated by commas; may be blank.

    Returns:
        The numbers.

    Raises:
        ValueError: the text is not such a list.
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if part:
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def choose_num_workers(*, num_cpus: int, num_cores: int, has_device: bool, num_sharers: int = 1) -> int:
    """Choose how many worker threads an engine has.

    Without a device the workers and torch's threads take turns with all processors. With one, two cores are left to the
    thread that launches kernels and to autograd's: the update runs exactly while forward launches, a few cores use all
    of a desktop's memory bandwidth, and two threads of one core compete.

    Args:
        num_cpus: logical processors that this process may use.
        num_cores: cores that these are on.
        has_device: whether forward and backward run on a device.
        num_sharers: processes that share them.

    Returns:
        Threads, from 1 to MAX_WORKERS.
    """
    share = max(1, (num_cores if has_device else num_cpus) // num_sharers)
    return min(max(1, share - 2) if has_device else share, MAX_WORKERS)


def choose_worker_cpus(
    topology: MachineTopology, num_workers: int, launching_core: Collection[int]
) -> tuple[frozenset[int], ...]:
    """Choose the processors that each worker thread may run on.

    Workers are spread over the memory nodes in proportion to their processors, and each may use every processor of its
    node, so that the scheduler can still move it out of the way of other threads. The launching thread's core is left
    out as far as processors are to spare: its own processor first, then its siblings.

    Args:
        topology: what this process may use.
        num_workers: worker threads, at least 1.
        launching_core: the processors that share a core with the launching thread, its own first.

    Returns:
        One set of processors per worker, none empty.
    """
    num_spare = len(topology.cpus) - num_workers
    reserved = [cpu for cpu in launching_core if cpu in topology.cpus][: max(0, num_spare)]
    usable = topology.cpus.difference(reserved)
    groups = [cpus & usable for _, cpus in topology.nodes if cpus & usable] or [usable]
    num_placed = [0] * len(groups)
    chosen: list[frozenset[int]] = []
    for _ in range(num_workers):
        least_loaded = min(range(len(groups)), key=lambda index: (num_placed[index] + 1) / len(groups[index]))
        num_placed[least_loaded] += 1
        chosen.append(groups[least_loaded])
    return tuple(chosen)


def read_topology(node_dir: Path = SYSFS_NODE_DIR) -> MachineTopology:
    """Return the processors and memory nodes of this machine that this process may use.

    Args:
        node_dir: the kernel's directory of memory nodes.

    Returns:
        Processors by memory node; no nodes if the system does not tell.
    """
    if not hasattr(os, "sched_getaffinity"):
        return MachineTopology(cpus=frozenset(range(os.cpu_count() or 1)), nodes=())
    cpus = frozenset(os.sched_getaffinity(0))
    nodes: list[tuple[int, frozenset[int]]] = []
    try:
        for path in node_dir.glob("node[0-9]*"):
            node_cpus = parse_cpu_list((path / "cpulist").read_text(encoding="ascii")) & cpus
            if node_cpus:
                nodes.append((int(path.name.removeprefix("node")), node_cpus))
    except (OSError, ValueError):
        nodes = []
    return MachineTopology(cpus=cpus, nodes=tuple(sorted(nodes)))


def read_num_cores(topology: MachineTopology, cpu_dir: Path = SYSFS_CPU_DIR) -> int:
    """Return on how many cores the processors of this process are.

    Args:
        topology: what this process may use.
        cpu_dir: the kernel's directory of processors.

    Returns:
        The number of cores; of processors if the system does not tell which share one.
    """
    try:
        cores = {
            parse_cpu_list((cpu_dir / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii"))
            for cpu in topology.cpus
        }
    except (OSError, ValueError):
        return len(topology.cpus)
    return len(cores)


def read_launching_core(cpu_dir: Path = SYSFS_CPU_DIR) -> tuple[int, ...]:
    """Return the core on which the calling thread runs now.

    Args:
        cpu_dir: the kernel's directory of processors.

    Returns:
        The processors of that core, the thread's own first; () if unknown.
    """
    try:
        # The process name, in brackets, may hold blanks; the processor is field 39 of proc(5), the state field 3.
        fields = Path("/proc/thread-self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        cpu = int(fields[39 - 3])
    except (OSError, ValueError, IndexError):
        return ()
    try:
        siblings = parse_cpu_list((cpu_dir / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii"))
    except (OSError, ValueError):
        siblings = frozenset()
    return (cpu, *sorted(siblings - {cpu}))


def interleave_memory(address: int, nbytes: int, nodes: Sequence[int]) -> bool:
    """Ask the system to spread the untouched pages of a mapping over memory nodes in turn.

    Args:
        address: page aligned start of the mapping.
        nbytes: length of the mapping.
        nodes: node numbers, at least one.

    Returns:
        Whether the system agreed.
    """
    status = lib.gn_memory_interleave(
        ffi.cast("void *", address), nbytes, ffi.new("int32_t[]", list(nodes)), len(nodes)
    )
    return int(status) == 0
