"""Small real resources for tests: budgets, memory, disk, threads and a simulated device."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from faults import FULL_DEVICE, descriptors_of

from gemini.config import GeminiConfig, NVMeConfig
from gemini.offload.resources import Resources, budgets_of, open_resources

KIB = 1 << 10
MIB = 1 << 20


@contextmanager
def small_resources(
    directory: Path | None = None, *, device: str = "cpu", disk_nbytes: int = 4 * MIB, **fields: Any
) -> Iterator[Resources]:
    """Yield resources with a disk tier if there is a directory, and close them."""
    nvme = None if directory is None else NVMeConfig(path=directory, budget=disk_nbytes)
    sizes = {"device_budget": "64MiB"} if device == "simulated" else {}
    config = GeminiConfig(
        **{"device": device, "host_budget": "64MiB", "num_threads": 2, "nvme": nvme, **sizes, **fields}
    )
    resources = open_resources(config, budgets_of(config), disk_nbytes=disk_nbytes if directory else 0)
    try:
        yield resources
    finally:
        resources.close()


@contextmanager
def truncated_file(path: Path, nbytes: int = 4096) -> Iterator[None]:
    """Cut a file behind its owner's back, so that reads meet its end, and restore it."""
    content = path.read_bytes()
    os.truncate(path, nbytes)
    yield
    path.write_bytes(content)


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    """Return uint8 [nbytes]."""
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def break_writes(resources: Resources) -> None:
    """Let every further transfer of the swap file fail for want of space: its descriptors lead to a full device."""
    assert resources.store is not None
    full = os.open(FULL_DEVICE, os.O_RDWR)
    numbers = descriptors_of(resources.store.path)
    assert numbers
    for number in numbers:
        os.dup2(full, number)
    os.close(full)


def mapped_nbytes() -> int:
    """Return the bytes of host buffers that this process maps, garbage left out."""
    gc.collect()
    total = nbytes = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Size:"):
            nbytes = int(line.split()[1]) * KIB
        elif line.startswith("VmFlags:") and "wf" in line.split():  # wiped on fork: what sets our buffers apart
            total += nbytes
    return total


def resident_pages(memory: torch.Tensor) -> int:
    """Number of the pages of page aligned memory that exist."""
    pages = (ctypes.c_ubyte * -(-memory.nbytes // 4096))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes), pages) == 0
    return sum(page & 1 for page in pages)
