"""The directory of this user's machine profiles: one file per machine."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from gemini.errors import ConfigError
from gemini.planning.hardware import HardwareProfile, load_profile
from gemini.planning.machine import MachineDescription, describe_machine

__all__ = ["cache_path", "cached_profile"]


def cache_path(machine: MachineDescription, directory: Path | None = None) -> Path:
    """Return the file of a machine's profile.

    Args:
        machine: the machine. The disk is ignored, so that the latest measurement is found for any disk.
        directory: directory of all profiles; None: the user's own.

    Returns:
        The path; the file need not exist.
    """
    parts = (platform.node(), machine.processor, machine.num_cpus, machine.memory_nbytes, machine.device)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    directory = Path.home() / ".cache" / "gemini-memory" if directory is None else directory
    return directory / f"profile-{digest}.json"


def cached_profile(directory: Path | None = None) -> HardwareProfile | None:
    """Return the latest measurement of this machine.

    Args:
        directory: as for `cache_path`.

    Returns:
        The profile; None if there is none, or if it has another version.
    """
    path = cache_path(describe_machine(), directory)
    try:
        return load_profile(path) if path.exists() else None
    except ConfigError:
        return None
