"""What an engine has of the node's memory service: a lease, a file on its disk, frozen weights that all jobs read.

[Note: Frozen weights of several jobs]
A frozen chunk whose tiles all live in host memory is asked for by a key made of where its values come from: the files
of a checkpoint (which, how long, of when) and the tensors' names there, or the values that the model has. Whoever asks
first writes the chunk into a memory file, tells the SHA-256 of its bytes and seals it; all others map it and read
nothing. It is mapped copy-on-write, so a page that a program writes to becomes that process's own.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from gemini.chunk.layout import ChunkSpec
from gemini.config import GeminiConfig
from gemini.errors import MissingLibraryError
from gemini.initialise import WeightSource
from gemini.offload.resources import budgets_of
from gemini.offload.swap_file import HEADER_NBYTES, GivenFile
from gemini.tiers import MemoryTier

if TYPE_CHECKING:
    from gemini.service import Lease, ServiceClient

__all__ = ["NodeMemory", "SharedPart", "shared_key"]

logger = logging.getLogger(__name__)

HASHED_NBYTES = 16 << 20
"""Bytes of a chunk that are hashed at a time; other threads run meanwhile."""


class SharedPart(NamedTuple):
    """A chunk of frozen weights as the service knows it."""

    key: str
    nbytes: int


class NodeMemory:
    """One engine's dealings with the service, from `connect` to `close`.

    Args:
        client: connected; closed with this.
    """

    def __init__(self, client: ServiceClient) -> None:
        self.client = client
        self._lease: Lease | None = None

    @staticmethod
    def connect(config: GeminiConfig, *, rank: int, num_ranks: int) -> NodeMemory | None:
        """Connect to the service that a configuration names; None if it names none.

        Args:
            config: of the engine.
            rank: this process's place among those that share the model.
            num_ranks: how many those are.

        Returns:
            The engine's part of the node's memory, of which nothing is leased yet.

        Raises:
            MissingLibraryError: the client's library is not installed.
            ServiceError: no service is there, or it refuses.
        """
        if config.service is None:
            return None
        try:
            from gemini.service import ServiceClient
        except ModuleNotFoundError as error:
            raise MissingLibraryError(
                f"GeminiConfig.service needs {error.name}: pip install 'gemini-memory[service]'"
            ) from error
        job = config.job or default_job()
        client = ServiceClient.connect(
            config.service, job=job, rank=rank, num_ranks=num_ranks, priority=config.priority
        )
        return NodeMemory(client)

    def budgets(self, config: GeminiConfig) -> dict[MemoryTier, int | None]:
        """Return the bytes per tier to plan with: the configuration's, within what the service has to grant.

        Args:
            config: of the engine; where it gives no host budget, a fair share of the node's memory counts.

        Returns:
            As `budgets_of`.

        Raises:
            ConfigError: as `budgets_of`.
            ServiceError: the service is gone.
        """
        budgets, node = budgets_of(config), self.client.budget()
        if config.host_budget is None:
            budgets[MemoryTier.HOST] = node.host_share
        nvme_nbytes = budgets[MemoryTier.NVME]
        if nvme_nbytes is not None:
            budgets[MemoryTier.NVME] = min(nvme_nbytes, max(0, node.disk_total - HEADER_NBYTES))
        return budgets

    def lease(self, host_nbytes: int, disk_nbytes: int, shared: Iterable[SharedPart]) -> GivenFile | None:
        """Wait until the service grants what an engine takes.

        Args:
            host_nbytes: all host memory, shared chunks included.
            disk_nbytes: for extents of the swap file.
            shared: chunks that the engine will ask for.

        Returns:
            The swap file; None if it takes no disk.

        Raises:
            OutOfTierMemoryError: the node does not have that much.
            ServiceError: the service refuses.
        """
        nbytes_of_key = {part.key: part.nbytes for part in shared}
        self._lease = self.client.lease(
            max(0, host_nbytes - sum(nbytes_of_key.values())),
            disk_nbytes + HEADER_NBYTES if disk_nbytes else 0,
            shared=nbytes_of_key,
            on_wait=lambda reason: logger.warning("waiting for the memory service: %s", reason),
        )
        disk = self._lease.disk
        return None if disk is None else GivenFile(path=disk.path, fd=disk.fd)

    def shared(self, part: SharedPart, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return a chunk of frozen weights that all jobs read; see [Note: Frozen weights of several jobs].

        Args:
            part: which one.
            fill: writes it, if nobody has yet, to uint8 [part.nbytes], zero.

        Returns:
            uint8 [part.nbytes], page aligned, with a storage of its own; what is written to it stays in this process.

        Raises:
            OutOfTierMemoryError: there is no room for it, or the machine has no memory.
            ServiceError: the service refuses.
        """
        with self.client.shared(part.key, part.nbytes) as chunk:
            if not chunk.is_filled:
                chunk.fill_done(_fill(chunk.fd, part.nbytes, fill))
            mapping = mmap.mmap(chunk.fd, part.nbytes, flags=mmap.MAP_PRIVATE)
        return torch.frombuffer(mapping, dtype=torch.uint8)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self.client.close()


def _fill(descriptor: int, nbytes: int, fill: Callable[[torch.Tensor], None]) -> str:
    """Let a memory file be written; return the digest of its content. Nothing maps it any more then."""
    os.posix_fallocate(descriptor, 0, nbytes)  # a shortage is an error here, and a signal in the first write
    with mmap.mmap(descriptor, nbytes) as mapping:
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        fill(memory)
        del memory
        digest = hashlib.sha256()
        with memoryview(mapping) as content:
            for begin in range(0, nbytes, HASHED_NBYTES):
                with content[begin : begin + HASHED_NBYTES] as part:
                    digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def default_job() -> str:
    """Return the name of a job that was given none: the program's, and the process's number."""
    program = "".join(c for c in Path(sys.argv[0]).stem if c.isascii() and (c.isalnum() or c in "-_.")) or "python"
    return f"{program[:64]}-{os.getpid()}"


def shared_key(
    chunk: ChunkSpec,
    *,
    nbytes: int,
    params: Mapping[str, torch.Tensor],
    weights: WeightSource | None,
) -> str | None:
    """Return the key of a frozen chunk, the same for all jobs in which it will have the same bytes.

    Args:
        chunk: its layout.
        nbytes: length of its home.
        params: the model's parameters, by canonical name; on the meta device if they have no values.
        weights: values that go before those; None: there are none.

    Returns:
        The key; None if it is not known before the values are made.
    """
    key = hashlib.sha256(repr((1, str(chunk.dtype), nbytes)).encode())
    for slot in chunk.slots:
        identity = None if weights is None else weights.identity_of(slot.spec.name)
        if identity is None:
            param = params[slot.spec.name]
            if param.is_meta or slot.spec.split is not None:
                return None
            identity = _digest_of(param.detach())
        key.update(repr((slot.begin, slot.spec.shape, identity)).encode())
    return f"frozen:{key.hexdigest()[:32]}"


def _digest_of(values: torch.Tensor) -> str:
    flat = values.cpu().contiguous().view(-1).view(torch.uint8)
    return f"{values.dtype}:{hashlib.sha256(flat.numpy().data).hexdigest()}"
