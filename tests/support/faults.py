"""Real faults: file systems that break, files that change behind their owner's back, system calls that are refused."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = [
    "FAILING_DEVICE",
    "FULL_DEVICE",
    "descriptors_of",
    "flip_bit",
    "forbid",
    "mounted",
    "redirected",
    "run_program",
]

TESTS = Path(__file__).parent.parent
FULL_DEVICE = "/dev/full"
"""Writes end with ENOSPC."""
FAILING_DEVICE = "/proc/self/mem"
"""Below the lowest mapping, reads and writes end with EIO."""
SYSTEM_CALLS = {
    "x86_64": {"clone": 56, "clone3": 435, "io_setup": 206, "io_uring_setup": 425},
    "aarch64": {"clone": 220, "clone3": 435, "io_setup": 0, "io_uring_setup": 425},
}


def flip_bit(path: Path, offset: int) -> None:
    """Change one bit of a file, past whoever has it open."""
    with open(path, "r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 0x10]), offset)
        os.fsync(file.fileno())


@contextlib.contextmanager
def mounted(point: Path, *arguments: str) -> Iterator[Path]:
    """Mount a file system on a new directory: mounted(point, "-t", "tmpfs", "-o", "size=1m", "tmpfs")."""
    point.mkdir()
    command = ["mount", *arguments, str(point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)


def descriptors_of(path: Path) -> list[int]:
    """Return this process's descriptors of a file, without those that hold a lock on it."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists() and link.readlink() == path]
    return [int(link.name) for link in links if "lock:" not in Path("/proc/self/fdinfo", link.name).read_text()]


@contextlib.contextmanager
def redirected(path: Path, device: str) -> Iterator[None]:
    """Let every transfer of a swap file go to a device for a while; none may be under way before or after."""
    numbers = descriptors_of(path)
    assert numbers
    kept = [os.dup(number) for number in numbers]
    opened = os.open(device, os.O_RDWR)
    try:
        for number in numbers:
            os.dup2(opened, number)
        yield
    finally:
        for number, original in zip(numbers, kept, strict=True):
            os.dup2(original, number)
            os.close(original)
        os.close(opened)


def forbid(*names: str, errno_value: int) -> bool:
    """Let system calls of this thread and its future children fail, for ever; return whether that is possible here."""
    numbers = [SYSTEM_CALLS.get(platform.machine(), {}).get(name) for name in names]
    lines = [(0x20, 0, 0, 0)]  # load the number of the call
    for number in numbers:
        if number is None:
            return False
        lines += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno_value)]
    lines.append((0x06, 0, 0, 0x7FFF0000))  # allow
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0)


def run_program(program: str, *arguments: object, timeout_s: float = 100) -> str:
    """Run a program in a process of its own, where tests and their helpers can be imported; return what it prints."""
    folders = [str(TESTS / name) for name in ("support", "training", ".")]
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {folders}\n{program}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()
