"""A chunk's working weights on their way from home into compute memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from gemini.errors import GeminiError, OffloadIOError
from gemini.kernels.pool import Ticket, WorkerPool
from gemini.offload.home import TiledHome, TileRun
from gemini.offload.io import IoTicket
from gemini.offload.transfer import Move, Transfers
from gemini.ranks.sharding import Collective
from gemini.tiers import MemoryTier

__all__ = ["Fetch", "Gather", "MoveStats"]

Gather = Callable[[Sequence[Move]], Collective]
"""Starts making a whole chunk of all ranks' shards, behind copies of this rank's shard under way."""


@dataclass(slots=True)
class MoveStats:
    """What the moves of working weights have cost since the counters were reset."""

    num_fetches: int = 0
    """Fetches of a chunk into compute memory."""
    num_misses: int = 0
    """Fetches that started only when the weights were needed."""
    fetched_nbytes: int = 0
    """Bytes fetched into compute memory."""
    read_nbytes: int = 0
    """Part of `fetched_nbytes` that came from disk."""
    stall_s: float = 0.0
    """Seconds that compute waited for fetches, as seen by the launching thread."""


class Fetch:
    """One fetch, started at construction and driven by `poll` until `finish`.

    Host memory that is compute memory is filled by the disk itself. A device is filled by uploads; what comes from
    disk, or from memory that is not page-locked, passes through `staging` first. With several ranks the home holds a
    shard, which `begin_gather` makes whole: all ranks must call it in the same order, and so it waits for the shard.

    Args:
        home: where the weights are.
        dst: uint8 compute memory, at least the home's bytes.
        transfers: the device's copy engine.
        pool: copies between two places of host memory.
        staging: uint8 page-locked host memory of the same length as `dst`; needed for a device when tiles are on disk.
            None lets copies from memory that is not page-locked block.
        gather: adds the other ranks' shards; None: the home holds everything.
        record: what is fetched, for recordings.
    """

    def __init__(
        self,
        home: TiledHome,
        dst: torch.Tensor,
        *,
        transfers: Transfers,
        pool: WorkerPool,
        staging: torch.Tensor | None = None,
        gather: Gather | None = None,
        record: str = "",
    ) -> None:
        self.staging = staging
        self._record = record
        self.nbytes_from = dict.fromkeys(MemoryTier, 0)
        self._dst: torch.Tensor | None = dst
        self._transfers = transfers
        self._pool = pool
        self._reads: list[tuple[TileRun, IoTicket | Ticket]] = []
        self._copies: list[Ticket] = []
        self._uploads: list[Move] = []
        self._gather = gather
        self._gathering: Collective | None = None
        self._failure: OffloadIOError | None = None
        try:
            self._start(home)
        except GeminiError:
            self.abandon()  # the caller will give the buffers to others
            raise

    def _start(self, home: TiledHome) -> None:
        transfers, staging, dst, pool = self._transfers, self.staging, self._dst, self._pool
        assert dst is not None
        has_device = transfers.compute_tier is MemoryTier.DEVICE
        for run in home.runs():
            self.nbytes_from[run.tier] += run.nbytes
            part = slice(run.begin, run.begin + run.nbytes)
            if run.tier is MemoryTier.NVME:
                landing = staging if has_device else dst
                assert landing is not None, "weights on disk reach a device through host memory"
                self._reads.append((run, home.read_run(run, landing[part])))
                continue
            source = home.memory_of(run)
            if has_device and staging is not None and run.tier is MemoryTier.HOST and home.is_pageable:
                self._reads.append((run, pool.submit_copy(staging[part], source, record=self._record)))
            elif has_device:
                self._uploads.append(transfers.upload(dst[part], source, record=self._record))
            else:
                self._copies.append(pool.submit_copy(dst[part], source, record=self._record))

    def poll(self) -> bool:
        """Move on without waiting: upload what the disk has delivered. A read that failed is reported by `finish`.

        Returns:
            Whether nothing is left to be started.
        """
        if self._reads and all(ticket.is_done() for _, ticket in self._reads):
            self._upload_what_was_read()
        return not self._reads

    def begin_gather(self) -> None:
        """Wait until the host knows of all that is to come of the home, and start gathering, if that is called for.

        Raises:
            OffloadIOError: a read failed.
            CollectiveError: the group has failed.
        """
        self._upload_what_was_read()
        if self._failure is not None:
            raise self._failure
        for copy in self._copies:
            copy.wait()
        if self._gather is not None and self._gathering is None:
            self._gathering = self._gather(self._uploads)

    def finish(self) -> None:
        """Wait until compute may use the weights.

        Raises:
            OffloadIOError: a read failed.
            CollectiveError: a rank did not take part.
        """
        self.begin_gather()
        for upload in self._uploads:
            upload.wait_on_compute()
        if self._gathering is not None:
            self._gathering.wait()
        self._leave()

    def may_reuse_staging(self) -> bool:
        """Return whether the staging buffer has been left by every copy."""
        return not self._reads and all(upload.is_done() for upload in self._uploads)

    def wait_for_copies(self) -> None:
        """Block until home and staging buffer have been left by every copy."""
        self._upload_what_was_read()
        for upload in self._uploads:
            upload.wait_on_host()

    def abandon(self) -> None:
        """Wait for everything under way without caring for the outcome, so that the buffers may be reused."""
        tickets: list[IoTicket | Ticket] = [*(ticket for _, ticket in self._reads), *self._copies]
        for ticket in tickets:
            with suppress(GeminiError):
                ticket.wait()
        for upload in self._uploads:
            upload.wait_on_host()
        for started in (self._reads, self._copies, self._uploads):
            started.clear()  # they refer to the buffers
        if self._gathering is not None:
            with suppress(GeminiError):
                self._gathering.wait()
        self._leave()

    def _leave(self) -> None:
        """Let go of the destination: whoever else is found to look at it does so in earnest."""
        self._dst = self._gathering = None

    def _upload_what_was_read(self) -> None:
        for run, ticket in self._reads:
            try:
                ticket.wait()
            except OffloadIOError as error:
                self._failure = error
                continue
            if self.staging is not None:
                assert self._dst is not None
                part = slice(run.begin, run.begin + run.nbytes)
                self._uploads.append(self._transfers.upload(self._dst[part], self.staging[part], record=self._record))
        self._reads.clear()
