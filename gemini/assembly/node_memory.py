"""An engine's resources from a memory service: budgets, a lease, a disk file, the kept state of a predecessor."""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gemini.assembly.blueprint import Blueprint
from gemini.assembly.engine_memory import Grant
from gemini.assembly.first_values import WeightSource
from gemini.assembly.shared_weights import SharedPart, fill_shared, find_shared_parts
from gemini.commits.file import CommitFile
from gemini.commits.recovery import common_sequence
from gemini.config import GeminiConfig
from gemini.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    MissingLibraryError,
    OutOfTierMemoryError,
    ServiceError,
)
from gemini.offload.resources import budgets_of
from gemini.offload.swap_file import HEADER_NBYTES, GivenFile
from gemini.ranks.agreement import least_of, on_all_ranks
from gemini.ranks.sharding import Sharding
from gemini.tiers import MemoryTier, format_nbytes

if TYPE_CHECKING:
    from gemini.service import KeptState, Lease, ServiceClient

__all__ = ["NodeMemory"]

logger = logging.getLogger(__name__)

ASKING = "asking the memory service"


class NodeMemory:
    """One engine's use of the service, from `connect` to `close`; see EngineMemory.

    Args:
        client: connected; closed with this.
        config: of the engine.
        sharding: the ranks that share the model; those on this machine are one job of its service.
    """

    def __init__(self, client: ServiceClient, config: GeminiConfig, sharding: Sharding) -> None:
        self.client = client
        self._config = config
        self._sharding = sharding
        self._kept: KeptState | None = None
        """Kept state that was taken over from a predecessor."""
        self._commits: CommitFile | None = None
        """Commit file of the predecessor; this engine's if it continues from there."""
        self._meta = b""
        """Description of the kept state: the host budget, and a digest that identifies the frozen weights it belongs
        to."""
        self._finalizer = weakref.finalize(self, _close_soon, client)
        self._finalizer.atexit = False  # the end of the process ends the connection

    @staticmethod
    def connect(config: GeminiConfig, sharding: Sharding) -> NodeMemory:
        """Connect to the service that a configuration names.

        Args:
            config: of the engine; names a service.
            sharding: the ranks that share the model; those on this machine are one job of its service.

        Returns:
            The engine's part of the node's memory, of which nothing is leased yet.

        Raises:
            ConfigError: several ranks share the model and the job has no name.
            MissingLibraryError: the client's library is not installed.
            ServiceError: no service is there, or it refuses.
        """
        assert config.service is not None
        rank, num_ranks = sharding.node_ranks.index(sharding.group.rank), len(sharding.node_ranks)
        if config.job is None and num_ranks > 1:
            raise ConfigError(
                f"GeminiConfig.job: expected a name that all {num_ranks} ranks share, so that the memory service "
                "can grant their requests together; got None"
            )
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
        if client.kept is not None and not config.snapshots:
            logger.warning(
                "the memory service keeps the state of a killed job %s: GeminiConfig(snapshots=True) continues "
                "from it, `python -m gemini evict %s` drops it",
                job,
                job,
            )
        return NodeMemory(client, config, sharding)

    def budgets(self) -> dict[MemoryTier, int | None]:
        """Return the bytes per tier to plan with: the configuration's, within what the service has to grant.

        Returns:
            As `budgets_of`, the same on all ranks. Of host memory, what a predecessor was granted whose state is kept;
            else, where the configuration gives no budget, a fair share of the node's.

        Raises:
            CheckpointError: what was kept is damaged.
            CheckpointMismatchError: what was kept of the ranks is not of one run.
            CollectiveError: a rank did not take part.
            ConfigError: as `budgets_of`.
            ServiceError: the service is gone.
        """
        sharding = self._sharding
        with self.explaining():
            with on_all_ranks(sharding, what=ASKING, error_type=ServiceError):
                self._take_kept()
            if common_sequence(sharding, self._commits) == 0:
                self._drop_kept()
        with on_all_ranks(sharding, what=ASKING, error_type=ServiceError):
            budgets = self._own_budgets()
        return least_of(sharding.group, budgets)

    def _own_budgets(self) -> dict[MemoryTier, int | None]:
        """Return what this rank would plan with."""
        budgets, node = budgets_of(self._config), self.client.budget()
        kept = self._kept_budget()
        if kept is not None:
            if self._config.host_budget is not None and budgets[MemoryTier.HOST] != kept:
                logger.warning(
                    "job %s continues with the host budget of %s that it had when it was killed",
                    self._config.job,
                    format_nbytes(kept),
                )
            budgets[MemoryTier.HOST] = kept
        elif self._config.host_budget is None:
            budgets[MemoryTier.HOST] = node.host_share
        nvme_nbytes = budgets[MemoryTier.NVME]
        if nvme_nbytes is not None:
            if node.disk_total == 0:
                logger.warning("the memory service has no disk, so none is used; start it with serve --nvme DIR:BYTES")
            budgets[MemoryTier.NVME] = min(
                nvme_nbytes, max(0, node.disk_total // len(self._sharding.node_ranks) - HEADER_NBYTES)
            )
        return budgets

    def _take_kept(self) -> None:
        """Take over the kept state of a predecessor, if there is any."""
        if self.client.kept is not None and self._config.snapshots:
            self._kept = self.client.take_kept()
            self._commits = CommitFile.open(self._kept.fd)

    def _drop_kept(self) -> None:
        """Give back the kept state, because it has no step that all ranks have committed."""
        if self._commits is not None:
            self._commits.close()
        if self._kept is not None:
            self._kept.lease.end()
        self._kept = self._commits = None

    def _kept_budget(self) -> int | None:
        return int(self._kept.meta.split()[0]) if self._kept is not None and self._kept.meta else None

    def shared_parts(
        self, blueprint: Blueprint, model: torch.nn.Module, weights: WeightSource | None
    ) -> Mapping[int, SharedPart]:
        """Return the frozen chunks that can be shared with other jobs, by chunk id; see find_shared_parts."""
        return find_shared_parts(blueprint, model, weights)

    def claim(self, blueprint: Blueprint, shared: Iterable[SharedPart]) -> Grant:
        """Wait until the service grants the memory of an engine, or take over the kept state of a predecessor.

        Args:
            blueprint: says how much.
            shared: chunks that the engine will ask for; in the blueprint's host budget, counted once for all jobs.

        Returns:
            What the engine takes beside plain host memory.

        Raises:
            CollectiveError: a rank did not take part.
            OutOfTierMemoryError: the node does not have that much.
            ServiceError: the service refuses, this rank or another.
        """
        with on_all_ranks(self._sharding, what=ASKING, error_type=ServiceError):
            return self._claim(blueprint, shared)

    def _claim(self, blueprint: Blueprint, shared: Iterable[SharedPart]) -> Grant:
        nbytes_of_key = {part.key: part.nbytes for part in shared}
        host_nbytes, disk_nbytes = blueprint.budgets[MemoryTier.HOST], blueprint.memory.total(MemoryTier.NVME)
        assert host_nbytes is not None
        frozen = hashlib.sha256("".join(nbytes_of_key).encode()).hexdigest().encode()
        self._meta = b"%d %s" % (host_nbytes, frozen)
        if self._kept is not None:
            if self._kept.meta.split()[1:] != [frozen]:
                logger.warning(
                    "job %s continues from its last commit, but its frozen weights come from other files, or the "
                    "files have changed: the trained weights may not fit them",
                    self._config.job,
                )
            return Grant(_swap_file(self._kept.lease), self._commits)
        lease = self.client.lease(
            max(0, host_nbytes - sum(nbytes_of_key.values())),
            disk_nbytes + HEADER_NBYTES if disk_nbytes else 0,
            shared=nbytes_of_key,
            on_wait=lambda reason: logger.warning("waiting for the memory service: %s", reason),
        )
        if blueprint.commits is None:
            return Grant(_swap_file(lease), None)
        nbytes = blueprint.commits.nbytes
        commits = CommitFile.create(lease.keep_file(nbytes), nbytes)
        lease.set_meta(self._meta)
        return Grant(_swap_file(lease), commits)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say in an error raised inside, of another's or a damaged state, where that comes from and how to drop it."""
        try:
            yield
        except (CheckpointError, CheckpointMismatchError) as error:
            raise type(error)(
                f"{error}. The memory service keeps it for job {self._config.job}: `python -m gemini evict "
                f"{self._config.job}` drops it"
            ) from error

    @contextmanager
    def explaining_budget(self) -> Iterator[None]:
        """Say in an error raised inside, of a budget that is too small, where that comes from."""
        try:
            yield
        except OutOfTierMemoryError as error:
            if self._config.host_budget is not None:
                raise
            raise OutOfTierMemoryError(
                f"{error}. By default, the host budget is this rank's fair share of what the memory service can "
                "grant (serve --host-budget); host_budget can lower it"
            ) from error

    def shared(self, part: SharedPart, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return a chunk of frozen weights that all jobs read; see shared_weights.py.

        Args:
            part: which one.
            fill: writes it, if nobody has yet, to uint8 [part.nbytes], zero.

        Returns:
            uint8 [part.nbytes], page aligned, with a storage of its own; what is written to it stays in this process.

        Raises:
            OutOfTierMemoryError: there is no room for it.
            OSError: the machine has no memory.
            ServiceError: the service refuses.
        """
        try:
            found = self.client.shared(part.key, part.nbytes)
        except OutOfTierMemoryError as error:  # only who has taken over what was kept has not asked for it before
            raise OutOfTierMemoryError(
                f"host tier: no room for {format_nbytes(part.nbytes)} of frozen weights now, which are granted "
                f"separately from the kept state of job {self._config.job}: start the job again when other jobs "
                "have ended; its committed state is kept until then"
            ) from error
        with found as chunk:
            if not chunk.is_filled:
                chunk.fill_done(fill_shared(chunk.fd, part.nbytes, fill))
            mapping = mmap.mmap(chunk.fd, part.nbytes, flags=mmap.MAP_PRIVATE)
        return torch.frombuffer(mapping, dtype=torch.uint8)

    def close(self, *, keep: bool = False) -> None:
        """Give everything back. Idempotent.

        Args:
            keep: whether the service keeps what was committed, as if this process had been killed.
        """
        self._finalizer.detach()
        self.client.close(keep=keep)

    def confirm(self) -> None:
        """Tell the service that the engine is complete: it needs no kept chunks except those that it has asked for."""
        if self._kept is not None:
            self._kept.lease.set_meta(self._meta)

    def abandon(self) -> None:
        """Give everything back because no engine came to be; what a predecessor left is kept."""
        if self._commits is not None:
            self._commits.close()
        self.close(keep=self._kept is not None)


def _close_soon(client: ServiceClient) -> None:
    """Give back what an engine that was not closed had, except its committed state; takes no lock in this thread."""
    threading.Thread(target=client.close, kwargs={"keep": True}, daemon=True).start()


def _swap_file(lease: Lease) -> GivenFile | None:
    return None if lease.disk is None else GivenFile(path=lease.disk.path, fd=lease.disk.fd)


def default_job() -> str:
    """Return the name of a job that was given none, another each time: the program's, the process's number, a token."""
    program = "".join(c for c in Path(sys.argv[0]).stem if c.isascii() and (c.isalnum() or c in "-_.")) or "python"
    return f"{program[:64]}-{os.getpid()}-{secrets.token_hex(2)}"
