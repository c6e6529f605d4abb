"""Rates of this machine for the cost model, measured in a few seconds with the engine's own means.

The engine's threads, buffers, copies and I/O engine are used, so that a prediction applies to this runtime.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gemini.config import GeminiConfig
from gemini.errors import ConfigError
from gemini.offload.bandwidth import measure_disk
from gemini.offload.resources import Resources, budgets_of, open_resources
from gemini.placement.cost_model import HardwareProfile
from gemini.planning.machine import MachineDescription
from gemini.tiers import MemoryTier

__all__ = ["HardwareProfile", "load_profile", "measure_hardware", "save_profile"]

_log = logging.getLogger(__name__)

MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_MATRIX_SIZE = 256
MAX_MATRIX_SIZE = 8192
PRODUCT_S = 0.01
"""Seconds after which a product is large enough; half precision on a processor without it takes this long at once."""
BUFFER_NBYTES = 64 << 20
"""Bytes of each buffer that is swept or copied; several together exceed any cache."""
MIN_SHARE = 0.01
"""Minimum share of a rate that remains beside other work; noise must not make it zero, nor more than all."""
PURPOSE = "hardware profile"


def measure_hardware(
    directory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    *,
    seconds: float = 0.3,
    disk_seconds: float = 1.0,
    disk_nbytes: int = 1 << 30,
) -> HardwareProfile:
    """Measure the rates that the cost model needs. Blocks, takes 0.5 GiB of memory, and leaves nothing behind.

    Args:
        directory: a directory on the swap file's disk; None: no disk is measured.
        device: as in GeminiConfig.device.
        seconds: minimum time for each rate except the disk's.
        disk_seconds: minimum time for each of the disk's rates: reads, writes, both, and both beside matrix products.
            Drives burst: the longer it is, the closer the rates are to the sustained ones.
        disk_nbytes: length of a temporary file on that disk.

    Returns:
        The profile.

    Raises:
        ConfigError: the device does not exist.
        OffloadIOError: the disk is full or fails.
        OutOfTierMemoryError: there is not enough memory.
    """
    config = GeminiConfig(device=device)
    resources = open_resources(config, budgets_of(config), disk_nbytes=0)
    try:
        profile = HardwareProfile(
            matrix_rates=_measure_products(resources, seconds),
            host_memory_rate=_measure_sweep(resources, seconds),
            **_measure_device(resources, seconds),
        )
        if directory is not None:
            disk_rates = _measure_disk(resources, profile, Path(directory), disk_nbytes, disk_seconds)
            profile = dataclasses.replace(profile, **disk_rates)
    finally:
        resources.close()
    _log.info("hardware profile: %s", profile)
    return profile


def save_profile(
    profile: HardwareProfile, path: str | os.PathLike[str], machine: MachineDescription | None = None
) -> None:
    """Write a profile as JSON; unknown rates are null.

    Args:
        profile: the measured rates.
        path: file to make or overwrite.
        machine: the machine's description; gemini.planning.machine.load_machine reads it.
    """
    document = dataclasses.asdict(profile)
    if machine is not None:
        document["machine"] = dataclasses.asdict(machine)
    Path(path).write_text(json.dumps(document, indent=2) + "\n", encoding="ascii")


def load_profile(path: str | os.PathLike[str]) -> HardwareProfile:
    """Read a profile.

    Args:
        path: a file that `save_profile` wrote.

    Returns:
        The profile.

    Raises:
        ConfigError: the file is not a profile.
        OSError: the file cannot be read.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="ascii"))
        fields.pop("machine", None)
        profile = HardwareProfile(**fields)
        rates = [rate for rate in (*profile.matrix_rates.values(), *list(fields.values())[1:]) if rate is not None]
        if not all(rate > 0 for rate in rates):
            raise ValueError("a rate is not positive")
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: expected a hardware profile as save_profile writes it ({error}); measure it again with "
            "measure_hardware"
        ) from error
    return profile


def _measure_products(resources: Resources, seconds: float) -> dict[str, float]:
    """Return operations per second of matrix products, by dtype."""
    rates = {}
    for dtype in MATRIX_DTYPES:
        size = MIN_MATRIX_SIZE
        product_s = _least_time(resources, size, dtype)
        while product_s < PRODUCT_S and size < MAX_MATRIX_SIZE:
            size *= 2
            product_s = _least_time(resources, size, dtype)
        if product_s < seconds:
            product_s = _time_product(resources, size, dtype, seconds=seconds)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / product_s
    return rates


def _least_time(resources: Resources, size: int, dtype: torch.dtype) -> float:
    """Return the seconds of one product, the least of three, because a single one may have been interrupted."""
    return min(_time_product(resources, size, dtype, seconds=0.0) for _ in range(3))


def _time_product(resources: Resources, size: int, dtype: torch.dtype, *, seconds: float) -> float:
    a = torch.ones(size, size, dtype=dtype, device=resources.transfers.device)
    result = torch.empty_like(a)
    return _time(resources, lambda: torch.mm(a, a, out=result), seconds)


def _measure_sweep(resources: Resources, seconds: float) -> float:
    """Return the bytes per second of a pass like Adam's: one buffer is read, three are read and written."""
    buffers = [resources.arena.allocate(BUFFER_NBYTES, PURPOSE).fill_(1) for _ in range(4)]  # touched pages
    sweep_s = _time(resources, lambda: resources.pool.submit_sweep(buffers[:1], buffers[1:]).wait(), seconds)
    for buffer in buffers:
        resources.arena.free(buffer)
    return 7 * BUFFER_NBYTES / sweep_s


def _measure_device(resources: Resources, seconds: float) -> dict[str, float]:
    """Return the rates of a device's memory and of the copies to and from it; none on the CPU."""
    transfers = resources.transfers
    if transfers.compute_tier is not MemoryTier.DEVICE:
        return {}
    host = resources.arena.allocate(BUFFER_NBYTES, PURPOSE).fill_(1)
    back = resources.arena.allocate(BUFFER_NBYTES, PURPOSE).fill_(1)
    here, there = (transfers.allocate(4 * BUFFER_NBYTES, PURPOSE).fill_(1) for _ in range(2))
    part, other_part = here[:BUFFER_NBYTES], there[:BUFFER_NBYTES]

    def copy_both_ways() -> None:
        moves = transfers.upload(part, host), transfers.download(back, other_part)
        for move in moves:
            move.wait_on_host()

    rates = {
        "device_memory_rate": 2 * here.nbytes / _time(resources, lambda: there.copy_(here), seconds),
        "h2d_rate": BUFFER_NBYTES / _time(resources, lambda: transfers.upload(part, host).wait_on_host(), seconds),
        "d2h_rate": BUFFER_NBYTES / _time(resources, lambda: transfers.download(host, part).wait_on_host(), seconds),
        "both_ways_rate": 2 * BUFFER_NBYTES / _time(resources, copy_both_ways, seconds),
    }
    for buffer in (here, there):
        transfers.free(buffer, PURPOSE)
    for buffer in (host, back):
        resources.arena.free(buffer)
    return rates


def _measure_disk(
    resources: Resources, profile: HardwareProfile, directory: Path, nbytes: int, seconds: float
) -> dict[str, Any]:
    """Return the rates of a disk, and what it and matrix products of the fastest dtype leave each other."""
    dtype, rate = max(profile.matrix_rates.items(), key=lambda item: item[1])
    size = min(MAX_MATRIX_SIZE, 1 << math.ceil(math.log2((rate * PRODUCT_S / 2) ** (1 / 3))))
    a = torch.ones(size, size, dtype=getattr(torch, dtype), device=resources.transfers.device)
    result = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, a, out=result)
        resources.transfers.synchronize()

    disk = measure_disk(directory, nbytes, seconds, load=multiply)
    assert disk.loaded_mixed_bytes_per_s is not None
    assert disk.load_calls_per_s is not None
    return {
        "nvme_read_rate": disk.read_bytes_per_s,
        "nvme_write_rate": disk.write_bytes_per_s,
        "nvme_mixed_rate": disk.mixed_bytes_per_s,
        "compute_share_beside_nvme": _share(disk.load_calls_per_s * 2 * size**3, rate),
        "nvme_share_beside_compute": _share(disk.loaded_mixed_bytes_per_s, disk.mixed_bytes_per_s),
    }


def _share(rate: float, rate_alone: float) -> float:
    return min(1.0, max(MIN_SHARE, rate / rate_alone))


def _time(resources: Resources, call: Callable[[], object], seconds: float) -> float:
    """Return the mean seconds of a call, over at least so many seconds and one call, after one that does not count."""
    call()
    resources.transfers.synchronize()
    num_calls = 0
    elapsed_s = 0.0
    start = time.perf_counter()
    while not num_calls or elapsed_s < seconds:
        call()
        num_calls += 1
        resources.transfers.synchronize()
        elapsed_s = time.perf_counter() - start
    return elapsed_s / num_calls
