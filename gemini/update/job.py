"""What the optimizer's pass is given to do, and whom it tells how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from gemini.chunk.layout import ChunkSpec
from gemini.kernels.adam_tile import AdamSegment
from gemini.kernels.journal import TileJournal
from gemini.kernels.pool import Ticket
from gemini.offload.arena import MemorySource
from gemini.offload.home import TiledHome
from gemini.offload.transfer import Mark, Move
from gemini.tiers import MemoryTier

__all__ = ["DeferredStep", "NoProgressLog", "PlannedUpdate", "ProgressLog", "StepPlanner", "UpdateJob"]


class StepPlanner(Protocol):
    """An optimizer, as far as the runtime knows one."""

    def expected_segments(self, chunk_id: int) -> tuple[AdamSegment, ...]:
        """Return what the next step will do to a chunk all of whose gradients have arrived, sorted."""


@dataclass(frozen=True, slots=True)
class PlannedUpdate:
    """What an optimizer step does to one chunk."""

    segments: tuple[AdamSegment, ...]
    """Runs of elements to update, in chunk coordinates, sorted."""
    grad_scale: float
    """Gradients are multiplied by this: clipping and loss scale."""


@dataclass(frozen=True, slots=True)
class DeferredStep:
    """A step whose updates wait for its commit."""

    planned: Mapping[int, PlannedUpdate]
    """What to do to the home of each chunk, in the home's coordinates."""
    kept: frozenset[int]
    """Chunks that may keep their slot."""


@dataclass(slots=True, kw_only=True, eq=False)
class UpdateJob:
    """The update of some tiles of one chunk."""

    spec: ChunkSpec
    """Layout of what the homes hold."""
    working: TiledHome
    state: TiledHome
    grad: TiledHome
    grad_dtype: torch.dtype
    segments: tuple[AdamSegment, ...]
    """Runs of elements to update, in the coordinates of `spec`, sorted; the rest is left alone."""
    grad_scale: float
    tiles: tuple[int, ...]
    """What to update; each holds part of a segment."""
    is_ahead: bool = False
    """Whether it runs before it is known whether it counts; then all of its tiles have spare places."""
    sequence: int = 0
    """Sequence of the commit that these updates belong to; 0 if nothing is committed."""
    arrivals: tuple[Ticket, ...] = ()
    """What must be complete before gradients may be read."""
    grad_slot: torch.Tensor | None = None
    """The chunk's gradients, uint8, while they are in host memory on their way to their home on disk."""
    refreshes: torch.Tensor | None = None
    """The chunk's copy in compute memory that is to show the new weights, of the chunk's dtype."""
    readers: Mark | None = None
    """What may still read the old weights there; taken in the thread that computes."""
    refreshing: list[Ticket | Move] = field(default_factory=list)
    """Copies to `refreshes` under way; compute waits for them before it uses the weights."""
    refreshes_late: torch.Tensor | None = None
    """As `refreshes`, but filled from the homes, all at once, when the update counts."""
    counts: bool = False
    """Whether what went to spare places has become the homes' content."""

    def goes_ahead(self, tile: int) -> bool:
        """Return whether a tile's results go to its spare place, so that until `flip` the update has not happened.

        On disk they always do, because a write that fails then tears nothing; in host memory only if need be.
        """
        is_on_disk = self.state.tiers[tile] is self.working.tiers[tile] is MemoryTier.NVME
        return self.state.has_spare(tile) and (self.is_ahead or is_on_disk)


class ProgressLog(Protocol):
    """Is told how far each tile is, so that a process that comes later can finish what was begun."""

    @property
    def memory(self) -> MemorySource | None:
        """Where the ring's buffers lie; None: anywhere."""

    def begin(self, job: UpdateJob, tile: int, ring: int | None) -> TileJournal | None:
        """Note that a tile is about to be updated in memory.

        Args:
            job: the update.
            tile: one of its tiles.
            ring: number of the ring buffer that holds what is on disk of it; None: nothing is.

        Returns:
            Where the update notes its progress; None: nowhere.
        """

    def end(self, job: UpdateJob, tile: int, ring: int | None) -> None:
        """Note that a tile has been updated in memory, before anything of it is written to disk."""

    def note_written(self, job: UpdateJob, tile: int, ring: int | None) -> None:
        """Note that what is on disk of a tile is new, before its ring buffer is used again."""


class NoProgressLog:
    """Notes nothing: no update outlives the process."""

    @property
    def memory(self) -> MemorySource | None:
        """None: the ring's buffers may lie anywhere."""
        return None

    def begin(self, job: UpdateJob, tile: int, ring: int | None) -> TileJournal | None:
        """Do nothing, and let the update do so too."""
        return None

    def end(self, job: UpdateJob, tile: int, ring: int | None) -> None:
        """Do nothing."""

    def note_written(self, job: UpdateJob, tile: int, ring: int | None) -> None:
        """Do nothing."""
