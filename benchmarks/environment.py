"""What a result file must say about where it came from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["describe_environment"]


def describe_environment() -> dict[str, Any]:
    """Return machine, versions, commit, command and date."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_directory, sys.argv[1:])]),
        "commit": _commit(),
        "processor": _processor_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "memory_nbytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def _without_directory(argument: str) -> str:
    """Return an argument that says nothing of where on the machine things are."""
    return "PATH" if os.sep in argument else argument


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # no git here
        return "unknown"
    return described.stdout.strip() or "unknown"


def _processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
