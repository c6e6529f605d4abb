"""Description of this machine: processor, memory, device and disk, as far as rates depend on them."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gemini.errors import ConfigError
from gemini.kernels.cpu import supported_isas
from gemini.kernels.topology import read_topology
from gemini.offload.accelerator import find_accelerator

__all__ = ["MachineDescription", "describe_machine", "load_machine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDescription:
    """A machine's parts and their sizes."""

    processor: str
    num_cpus: int
    """Number of logical processors that this process may use."""
    instruction_sets: tuple[str, ...]
    """Instruction sets of the native kernels that run here, slowest first."""
    num_memory_nodes: int
    """Number of memory nodes; 0 if the system does not tell."""
    memory_nbytes: int
    device: str | None
    """Name of the first CUDA device; None if there is none."""
    device_memory_nbytes: int | None
    disk_nbytes: int | None
    """Size of the measured file system in bytes; None if none was measured."""
    disk_free_nbytes: int | None


def describe_machine(directory: str | os.PathLike[str] | None = None) -> MachineDescription:
    """Describe this machine; takes no memory and no time.

    Args:
        directory: a directory on the disk to describe; None: no disk.

    Returns:
        The description.

    Raises:
        OSError: the directory does not exist.
    """
    topology = read_topology()
    disk = None if directory is None else shutil.disk_usage(directory)
    device = find_accelerator()
    module = None if device is None else torch.get_device_module(device)
    return MachineDescription(
        processor=_processor_name(),
        num_cpus=len(topology.cpus),
        instruction_sets=tuple(isa.name.lower() for isa in supported_isas()),
        num_memory_nodes=len(topology.nodes),
        memory_nbytes=psutil.virtual_memory().total,
        device=None if module is None else module.get_device_name(device),
        device_memory_nbytes=None if module is None else module.get_device_properties(device).total_memory,
        disk_nbytes=None if disk is None else disk.total,
        disk_free_nbytes=None if disk is None else disk.free,
    )


def load_machine(path: str | os.PathLike[str]) -> MachineDescription | None:
    """Read the machine's description from a profile's file.

    Args:
        path: a file that gemini.planning.hardware.save_profile wrote.

    Returns:
        The description; None if the file has only rates.

    Raises:
        ConfigError: the file is not a profile.
        OSError: the file cannot be read.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8")).get("machine")
        if fields is None:
            return None
        return MachineDescription(**{**fields, "instruction_sets": tuple(fields["instruction_sets"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: expected the profile of a machine ({error}); write it again with python -m gemini bench --json"
        ) from error


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
