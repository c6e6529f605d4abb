"""What of this process is resident, by the kernel's own count (proc(5)).

Not getrusage: `ru_maxrss` of a child begins with the peak of the process that started it.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["forget_peak", "peak_resident_nbytes", "resident_nbytes"]


def resident_nbytes() -> int:
    """Return the bytes that are resident now."""
    return _status_nbytes("VmRSS")


def peak_resident_nbytes() -> int:
    """Return the most bytes that were resident, since the process began or `forget_peak`."""
    return _status_nbytes("VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew with what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status_nbytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
