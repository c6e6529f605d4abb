"""What one engine owns outside its chunks: budgets, memory, disk, threads and the way between them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from gemini.config import GeminiConfig
from gemini.errors import ConfigError
from gemini.kernels.cpu import Isa, resolve_isa
from gemini.kernels.pool import WorkerPool
from gemini.kernels.topology import read_topology
from gemini.offload.arena import HostArena
from gemini.offload.store import DiskStore
from gemini.offload.swap_file import GivenFile, KeptSwap, check_directory
from gemini.offload.transfer import CpuTransfers, CudaTransfers, SimulatedTransfers, Transfers
from gemini.tiers import MemoryTier, TierLedger, checksum_nbytes

__all__ = ["MAX_DEFAULT_THREADS", "Resources", "budgets_of", "device_of", "open_resources"]

logger = logging.getLogger(__name__)

SIMULATED = "simulated"
MARGIN = 0.9
"""Part of what is free that is taken where the user gave no budget."""
MAX_DEFAULT_THREADS = 16


class Granter(Protocol):
    """Who has granted memory and disk."""

    def close(self, *, keep: bool = False) -> None:
        """Take everything back; with `keep`, all but what would outlive the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Everything with a life cycle that chunks share; `close` ends it in the right order."""

    ledger: TierLedger
    arena: HostArena
    pool: WorkerPool
    transfers: Transfers
    store: DiskStore | None
    isa: Isa
    granted_by: Granter | None = None
    """Who has granted memory and disk, and is told when they are given back; None if nobody was asked."""

    def close(self, *, keep: bool = False) -> None:
        """End all I/O and threads and give all memory and the swap file back.

        Args:
            keep: whether what would outlive the process outlives this.
        """
        self.transfers.synchronize()
        if self.store is not None:
            self.store.close()
        self.pool.close()
        self.arena.close()
        if self.granted_by is not None:
            self.granted_by.close(keep=keep)


def available_host_nbytes() -> int:
    """Return the bytes of memory that could be taken now, by the machine's count and by the control group's."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        current = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, max(int(limit) - int(current), 1))


def device_of(config: GeminiConfig) -> torch.device | str | None:
    """Return the CUDA device, "simulated", or None for the CPU.

    Args:
        config: what the user asked for.

    Returns:
        What forward and backward run on.

    Raises:
        ConfigError: there is no such device.
    """
    wanted = config.device
    if wanted is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    if wanted == SIMULATED:
        return SIMULATED
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f'GeminiConfig.device: expected "cuda", "cpu", "simulated" or None, got {wanted!r}'
        ) from error
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ConfigError(f"GeminiConfig.device: {device.type!r} devices are not supported; use cuda or cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"GeminiConfig.device: {wanted!r} was asked for, but torch finds no CUDA device")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def budgets_of(config: GeminiConfig) -> dict[MemoryTier, int | None]:
    """Turn the configured budgets into bytes.

    Args:
        config: where a budget is None, what is free now counts, less a tenth.

    Returns:
        Bytes per tier; None for a tier that does not exist (the device on a CPU, NVMe without a directory).

    Raises:
        ConfigError: a device budget was given for a computation that was put on the CPU by name.
    """
    device = device_of(config)
    if device is None:
        if config.device_budget is not None and config.device is not None:
            raise ConfigError(
                'GeminiConfig: device_budget has no meaning with device="cpu", where host_budget is the memory budget; '
                "leave one of them out"
            )
        if config.device_budget is not None:
            logger.warning("device_budget is not used: there is no CUDA device, and host_budget bounds all memory")
        device_nbytes = None
    elif config.device_budget is not None:
        device_nbytes = config.device_budget_nbytes
    elif isinstance(device, torch.device):
        device_nbytes = int(torch.cuda.mem_get_info(device)[0] * MARGIN)
    else:
        device_nbytes = int(available_host_nbytes() * MARGIN / 2)
    host_nbytes = config.host_budget_nbytes
    if host_nbytes is None:
        host_nbytes = int(available_host_nbytes() * MARGIN)
    return {
        MemoryTier.DEVICE: device_nbytes,
        MemoryTier.HOST: host_nbytes,
        MemoryTier.NVME: config.nvme_budget_nbytes,
    }


def open_resources(
    config: GeminiConfig,
    budgets: dict[MemoryTier, int | None],
    *,
    disk_nbytes: int,
    rank: int = 0,
    kept: KeptSwap | None = None,
    given: GivenFile | None = None,
    granted_by: Granter | None = None,
) -> Resources:
    """Start threads, claim the swap file and prepare memory.

    Args:
        config: what the user asked for.
        budgets: from `budgets_of`.
        disk_nbytes: bytes the swap file must hold; 0 leaves the disk alone.
        rank: whose swap file it is.
        kept: makes the swap file one that outlives the process; None: it is scratch space.
        given: the swap file, if somebody gives it; None: the engine makes its own.
        granted_by: has granted memory and disk, and is closed with them; None: nobody was asked.

    Returns:
        The resources; the caller closes them.

    Raises:
        OffloadIOError: the swap file cannot be made, claimed or filled.
        ConfigError: disk space is needed and no NVMe tier is configured, or a forced engine does not work here.
    """
    device = device_of(config)
    isa = resolve_isa(config.isa)
    ledger = TierLedger(budgets)
    num_threads = config.num_threads or min(len(os.sched_getaffinity(0)), MAX_DEFAULT_THREADS)
    pool = WorkerPool(num_threads, isa=isa)
    try:
        store = _open_store(config, ledger, disk_nbytes=disk_nbytes, rank=rank, kept=kept, given=given)
    except BaseException:
        pool.close()
        raise
    nodes = [node for node, _ in read_topology().nodes]
    arena = HostArena(ledger, device=device if isinstance(device, torch.device) else None, nodes=nodes)
    transfers: Transfers
    if device is None:
        transfers = CpuTransfers(arena)
    elif isinstance(device, torch.device):
        transfers = CudaTransfers(device, ledger)
    else:
        transfers = SimulatedTransfers(ledger, pool)
    return Resources(
        ledger=ledger, arena=arena, pool=pool, transfers=transfers, store=store, isa=isa, granted_by=granted_by
    )


def _open_store(
    config: GeminiConfig,
    ledger: TierLedger,
    *,
    disk_nbytes: int,
    rank: int,
    kept: KeptSwap | None,
    given: GivenFile | None,
) -> DiskStore | None:
    """Claim the swap file, if one is needed."""
    nvme = config.nvme
    if nvme is None:
        if disk_nbytes:
            raise ConfigError("this plan puts bytes on disk: give GeminiConfig(nvme=NVMeConfig(path=..., budget=...))")
        return None
    if not disk_nbytes and config.service is None:
        check_directory(Path(nvme.path))  # a mistake would show only when a larger model needs the disk
    if not disk_nbytes:
        return None
    if nvme.verify:
        ledger.charge(MemoryTier.HOST, "checksums", checksum_nbytes(disk_nbytes))
    return DiskStore(nvme, capacity_nbytes=disk_nbytes, rank=rank, kept=kept, given=given)
