"""The resources of an engine outside its chunks: budgets, memory, disk, threads and transfers."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from gemini.config import GeminiConfig
from gemini.errors import ConfigError
from gemini.kernels.cpu import Isa, resolve_isa
from gemini.kernels.pool import WorkerPool
from gemini.kernels.topology import choose_num_workers, read_num_cores, read_topology
from gemini.offload.accelerator import Accelerator, find_accelerator, is_accelerator
from gemini.offload.arena import NOT_COPIED_BY_DEVICE, HostArena
from gemini.offload.store import DiskStore
from gemini.offload.swap_file import GivenFile, KeptSwap, check_directory
from gemini.offload.transfer import CpuTransfers, SimulatedTransfers, StreamTransfers, Transfers
from gemini.tiers import MemoryTier, TierLedger, checksum_nbytes

__all__ = ["Resources", "budgets_of", "default_num_threads", "device_of", "open_resources"]

logger = logging.getLogger(__name__)

SIMULATED = "simulated"
WITHOUT_BUFFERS = ("checksums", "commits")
"""Purposes of host memory that is charged to the ledger and taken elsewhere, by the I/O engine and in a memory file."""
MARGIN = 0.9
"""Fraction of the free amount that is taken where the user set no budget."""


class Granter(Protocol):
    """The grant of the memory and the disk that an engine takes."""

    def close(self, *, keep: bool = False) -> None:
        """End the grant; with `keep`, what is meant to outlive the process stays granted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The resources with a life cycle that chunks share; `close` ends them in the right order."""

    ledger: TierLedger
    arena: HostArena
    pool: WorkerPool
    transfers: Transfers
    store: DiskStore | None
    isa: Isa
    accelerator: Accelerator | None = None
    """The device, if it is one of torch's; None: the CPU, or the simulated device."""
    granted_by: Granter | None = None
    """Grant of memory and disk, ended when they are given back; None without a service."""

    def close(self, *, keep: bool = False) -> None:
        """End all I/O and threads, and free all memory and the swap file.

        Args:
            keep: whether state that is meant to outlive the process is kept.
        """
        with ExitStack() as stack:  # each is closed although one before it fails, as a device after a fault does
            if self.granted_by is not None:
                stack.callback(self.granted_by.close, keep=keep)
            stack.callback(self.arena.close)
            stack.callback(self.pool.close)
            if self.store is not None:
                stack.callback(self.store.close)
            stack.callback(self._credit_without_buffers)
            self.transfers.synchronize()

    def _credit_without_buffers(self) -> None:
        for purpose in WITHOUT_BUFFERS:
            nbytes = self.ledger.by_purpose(MemoryTier.HOST).get(purpose, 0)
            self.ledger.credit(MemoryTier.HOST, purpose, nbytes)


def available_host_nbytes() -> int:
    """Return the bytes of memory that can be taken now, limited by both the machine and the control group."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        current = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else min(available, max(int(limit) - int(current), 1))


def device_of(config: GeminiConfig) -> torch.device | str | None:
    """Return the accelerator, "simulated", or None for the CPU.

    Args:
        config: the user's configuration.

    Returns:
        The device that forward and backward run on.

    Raises:
        ConfigError: the device does not exist.
    """
    wanted = config.device
    if wanted is None:
        return find_accelerator()
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
    if not is_accelerator(device.type):
        raise ConfigError(f"GeminiConfig.device: {device.type!r} devices are not supported; use cuda or cpu")
    found = find_accelerator()
    if found is None or found.type != device.type:
        name = "CUDA" if device.type == "cuda" else device.type
        raise ConfigError(f"GeminiConfig.device: {wanted!r} was requested, but torch finds no {name} device")
    return device if device.index is not None else found


def budgets_of(config: GeminiConfig) -> dict[MemoryTier, int | None]:
    """Turn the configured budgets into bytes.

    Args:
        config: the configuration; where a budget is None, it is what is free now, less a tenth.

    Returns:
        Bytes per tier; None for a tier that does not exist (the device on a CPU, NVMe without a directory).

    Raises:
        ConfigError: a device budget was set although the device is explicitly the CPU.
    """
    device = device_of(config)
    if device is None:
        if config.device_budget is not None and config.device is not None:
            raise ConfigError(
                'GeminiConfig: device_budget has no meaning with device="cpu", where host_budget is the memory budget; '
                "leave one of them out"
            )
        if config.device_budget is not None:
            logger.warning("device_budget is not used: there is no accelerator, so host_budget limits all memory")
        device_nbytes = None
    elif config.device_budget is not None:
        device_nbytes = config.device_budget_nbytes
    elif isinstance(device, torch.device):
        device_nbytes = int(Accelerator(device).free_nbytes() * MARGIN)
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


def default_num_threads(*, has_device: bool, num_sharers: int = 1) -> int:
    """Return the worker threads of an engine on this machine; see choose_num_workers."""
    topology = read_topology()
    num_cpus, num_cores = len(topology.cpus), read_num_cores(topology)
    return choose_num_workers(num_cpus=num_cpus, num_cores=num_cores, has_device=has_device, num_sharers=num_sharers)


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
        config: the user's configuration.
        budgets: budgets from `budgets_of`.
        disk_nbytes: bytes that the swap file must hold; 0: the disk is not used.
        rank: the rank that owns the swap file.
        kept: makes the swap file outlive the process; None: the file is scratch space.
        given: a swap file made by the memory service; None: the engine makes its own.
        granted_by: grant of memory and disk, closed with them; None if nobody was asked.

    Returns:
        The resources; the caller closes them.

    Raises:
        OffloadIOError: the swap file cannot be made, claimed or filled.
        ConfigError: disk space is needed and no NVMe tier is configured, or a forced engine does not work here.
    """
    device = device_of(config)
    isa = resolve_isa(config.isa)
    ledger = TierLedger(budgets)
    num_threads = config.num_threads or default_num_threads(has_device=device is not None)
    pool = WorkerPool(num_threads, isa=isa)
    try:
        store = _open_store(config, ledger, disk_nbytes=disk_nbytes, rank=rank, kept=kept, given=given)
    except BaseException:
        pool.close()
        raise
    nodes = [node for node, _ in read_topology().nodes]
    accelerator = Accelerator(device) if isinstance(device, torch.device) else None
    # Sums of gradients leave the device for their homes without a stop.
    sums_on_device = config.gradient_accumulation and config.placement == "auto"
    never_copied = NOT_COPIED_BY_DEVICE - {"gradients"} if sums_on_device else NOT_COPIED_BY_DEVICE
    arena = HostArena(ledger, accelerator=accelerator, nodes=nodes, never_copied=never_copied, pool=pool)
    transfers: Transfers
    if device is None:
        transfers = CpuTransfers(arena)
    elif accelerator is not None:
        transfers = StreamTransfers(accelerator, ledger)
    else:
        transfers = SimulatedTransfers(ledger, pool)
    return Resources(
        ledger=ledger,
        arena=arena,
        pool=pool,
        transfers=transfers,
        store=store,
        isa=isa,
        accelerator=accelerator,
        granted_by=granted_by,
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
    """Claim the swap file if one is needed."""
    nvme = config.nvme
    if nvme is None:
        if disk_nbytes:
            raise ConfigError("this plan puts bytes on disk: give GeminiConfig(nvme=NVMeConfig(path=..., budget=...))")
        return None
    if not disk_nbytes and config.service is None:
        check_directory(Path(nvme.path))  # else a mistake would only show when a larger model needs the disk
    if not disk_nbytes:
        return None
    if nvme.verify:
        ledger.charge(MemoryTier.HOST, "checksums", checksum_nbytes(disk_nbytes))
    return DiskStore(nvme, capacity_nbytes=disk_nbytes, rank=rank, kept=kept, given=given)
