"""Checks that ranks agree before they share a model: configuration, budgets, the model and its initial values."""

from __future__ import annotations

import dataclasses
import socket
import zlib
from pathlib import Path

import torch

from gemini.config import GeminiConfig
from gemini.errors import ConfigError, ModelError
from gemini.model.tensor_parallel import local_part, split_of
from gemini.offload.resources import budgets_of, default_num_threads, device_of
from gemini.ranks.agreement import least_of
from gemini.ranks.sharding import ShardGroup
from gemini.tiers import MemoryTier

__all__ = ["check_same_config", "check_same_model", "find_node_ranks", "share_node"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def check_same_config(config: GeminiConfig, stage: int, group: ShardGroup) -> None:
    """Check that all ranks were given the same configuration; disk directories and device numbers may differ.

    Args:
        config: this rank's configuration.
        stage: this rank's stage.
        group: the ranks.

    Raises:
        ConfigError: another rank has another configuration.
        CollectiveError: a rank did not take part.
    """
    nvme = None if config.nvme is None else dataclasses.replace(config.nvme, path=".")
    device = str(config.device).partition(":")[0]
    text = f"{dataclasses.replace(config, nvme=nvme, device=device)} {stage}"
    others = _ranks_that_differ(zlib.crc32(text.encode()), group, name="configurations")
    if others:
        raise ConfigError(
            f"zero.shard: rank {group.rank} and rank {others[0]} were given different configurations or stages; rank "
            f"{group.rank} has stage {stage}, {config}"
        )


def check_same_model(model: torch.nn.Module, group: ShardGroup) -> None:
    """Check that all ranks were given the same model with the same values; each will keep a part of them.

    Args:
        model: this rank's model; tensors on the meta device have no values to compare.
        group: the ranks.

    Raises:
        ModelError: another rank has another model, or a DTensor is divided unevenly.
        CollectiveError: a rank did not take part.
    """
    structure = copies = parts = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        split = split_of(name, tensor)
        dim = None if split is None else split.dim
        kind = (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, tensor.is_meta, dim)
        structure = zlib.crc32(repr(kind).encode(), structure)
        if not tensor.is_meta and isinstance(tensor, torch.nn.Parameter):
            content = local_part(tensor).detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
            if split is None:
                copies = zlib.crc32(content, copies)
            else:
                parts = zlib.crc32(content, parts)
    num_peers = len(group.ranks) // group.grid.num_tensor_ranks
    peers = group.ranks[group.grid.tensor_rank * num_peers :][:num_peers]
    seed = "set the same seed before building the model, or load a checkpoint"
    for fingerprint, what, ranks, remedy in (
        (structure, "models", group.ranks, "build the same model everywhere"),
        (copies, "first values of parameters", group.ranks, seed),
        (parts, "first values of parameters", peers, seed),
    ):
        others = [rank for rank in _ranks_that_differ(fingerprint, group, name=what) if rank in ranks]
        if others:
            raise ModelError(
                f"zero.shard: rank {group.rank} and rank {others[0]} have different {what}, although each rank "
                f"keeps a part of it: {remedy}"
            )


def find_node_ranks(group: ShardGroup) -> tuple[int, ...]:
    """Return the ranks that run on this rank's machine, itself included, in the order of `group.ranks`."""
    boot_id = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
    node = zlib.crc32(f"{socket.gethostname()} {boot_id}".encode())
    others = _ranks_that_differ(node, group, name="machines")
    return tuple(rank for rank in group.ranks if rank not in others)


def share_node(config: GeminiConfig, num_node_ranks: int, group: ShardGroup) -> GeminiConfig:
    """Return the configuration of one of a machine's ranks: its part of host memory, disk and threads.

    All ranks get the lowest budgets of any rank, so that they make the same plan.

    Args:
        config: the machine's; the device budget is each rank's own.
        num_node_ranks: ranks on the machine.
        group: the ranks.

    Returns:
        The rank's, with budgets in bytes.

    Raises:
        ConfigError: a budget was given for a tier that there is not.
        CollectiveError: a rank did not take part.
    """
    budgets = budgets_of(config)
    shares = {MemoryTier.DEVICE: 1, MemoryTier.HOST: num_node_ranks, MemoryTier.NVME: num_node_ranks}
    own = {tier: None if nbytes is None else nbytes // shares[tier] for tier, nbytes in budgets.items()}
    agreed = least_of(group, own)
    has_device = device_of(config) is not None
    nvme, nvme_nbytes = config.nvme, agreed[MemoryTier.NVME]
    if nvme is not None and nvme_nbytes is not None:
        nvme = dataclasses.replace(nvme, budget=nvme_nbytes)
    is_served = config.service is not None and config.host_budget is None  # then the service decides how much
    return dataclasses.replace(
        config,
        device_budget=agreed[MemoryTier.DEVICE],
        host_budget=None if is_served else agreed[MemoryTier.HOST],
        nvme=nvme,
        num_threads=config.num_threads or default_num_threads(has_device=has_device, num_sharers=num_node_ranks),
    )


def check_all_built(error: BaseException | None, group: ShardGroup) -> None:
    """Check that no rank failed to build its engine, because the others would wait for it.

    Args:
        error: the failure of this rank; None if there is none.
        group: the ranks.

    Raises:
        ModelError: another rank failed; that rank says why.
        CollectiveError: a rank did not take part.
    """
    has_failed = torch.tensor([error is not None], dtype=torch.int64)
    failed = group.gather_values(has_failed, name="outcomes of construction")[:, 0].nonzero()[:, 0].tolist()
    if failed and error is None:
        rank = group.ranks[failed[0]]
        raise ModelError(
            f"zero.shard: rank {rank} could not build its engine and reports the reason; the engine of this rank is "
            "closed"
        )


def _ranks_that_differ(fingerprint: int, group: ShardGroup, *, name: str) -> list[int]:
    """Return the ranks whose fingerprint is another."""
    fingerprints = group.gather_values(torch.tensor([fingerprint], dtype=torch.int64), name=name)[:, 0].tolist()
    return [rank for rank, other in zip(group.ranks, fingerprints, strict=True) if other != fingerprint]
