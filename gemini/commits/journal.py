"""Progress of the updates of the last committed step, in memory that outlives the process.

[Note: Redo]
A commit is a record of what a step will do to each chunk. It is published while weights and state are still those of
the previous step and the gradients are waiting. The updates follow, in place. A process that later gets the file does
the remaining updates with the same kernels, and so with the same bits. Finished work is marked with the sequence number
of the record:

*State and working weights of a tile in the file*: each block of elements has an entry, and a block that is interrupted
has its image in a thread's scratch (kernels/journal.py).

*Both on disk*: the tile is read into a buffer of the ring, which is in the file too, updated there and written back.
Its word says UPDATED before the write is submitted, and WRITTEN when it has completed, before the buffer is used again.
An interrupted write is done again from the buffer; without a word of this sequence what is on disk is old, and whole.

*One here, one there*: the word says UPDATING before the update begins, so that the buffer is known in which the other
half of each block is; then as both others.

Gradients on disk are read again. They are overwritten when the chunk's update is complete, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from gemini.commits.file import CommitFile
from gemini.kernels.journal import BLOCK_NUMEL, SCRATCH_NBYTES, ScratchImage, TileJournal, read_scratch
from gemini.offload.arena import MemorySource
from gemini.tiers import MemoryTier, TileGrid
from gemini.update.job import UpdateJob

__all__ = ["InterruptedBlock", "TileNote", "TileStage", "UpdateJournal"]


class TileStage(IntEnum):
    """Progress of a tile that is partly on disk."""

    UPDATING = 1
    """A ring buffer holds the part, in which blocks are old or new."""
    UPDATED = 2
    """A ring buffer holds the part, all new; what is on disk may be anything."""
    WRITTEN = 3
    """The tile on disk is new."""


@dataclass(frozen=True, slots=True)
class TileNote:
    """A tile's word."""

    sequence: int
    """Sequence number of the step that it describes; 0 if there is none."""
    stage: TileStage
    ring: int
    """Number of the ring buffer."""


@dataclass(frozen=True, slots=True)
class InterruptedBlock:
    """A block in the middle of which the process ended, and what it was before."""

    chunk_id: int
    block: int
    """Counted from the chunk's first."""
    scratch: ScratchImage


class UpdateJournal:
    """The entries, words and scratches of one engine.

    Args:
        file: claimed; closed by its owner.
        numels: elements of each trainable chunk's homes, by chunk id.
        tile_numel: elements in a tile, a multiple of BLOCK_NUMEL.
    """

    def __init__(self, file: CommitFile, numels: Mapping[int, int], *, tile_numel: int) -> None:
        assert tile_numel % BLOCK_NUMEL == 0
        self.file = file
        self._tile_numel = tile_numel
        self._blocks = file.blocks
        self._words = file.words
        self._scratches = file.scratches
        self._first_block: dict[int, int] = {}
        self._first_word: dict[int, int] = {}
        num_blocks = num_words = 0
        for chunk_id, numel in sorted(numels.items()):
            self._first_block[chunk_id], self._first_word[chunk_id] = num_blocks, num_words
            num_blocks += -(-numel // BLOCK_NUMEL)
            num_words += TileGrid(numel, tile_numel).num_tiles

    @property
    def memory(self) -> MemorySource:
        """Memory of the ring's buffers."""
        return self.file

    def begin(self, job: UpdateJob, tile: int, ring: int | None) -> TileJournal | None:
        """Note that a tile is about to be updated in memory, all its parts being there.

        Args:
            job: the update; has a sequence.
            tile: one of its tiles.
            ring: the buffer that holds what is on disk of it; None: nothing is.

        Returns:
            Where the update notes its progress; None: it need not, because what is on disk is all there is of the tile.
        """
        tiers = _tiers_of(job, tile)
        if MemoryTier.HOST not in tiers:
            return None
        if MemoryTier.NVME in tiers:
            self._note(job, tile, TileStage.UPDATING, ring)
        chunk_id = job.spec.chunk_id
        first = self._first_block[chunk_id] + tile * (self._tile_numel // BLOCK_NUMEL)
        length = TileGrid(job.spec.numel, self._tile_numel).length_of(tile)
        return TileJournal(
            sequence=job.sequence,
            first_block=first,
            done=self._blocks[first : first + -(-length // BLOCK_NUMEL)],
            scratches=self._scratches,
        )

    def end(self, job: UpdateJob, tile: int, ring: int | None) -> None:
        """Note that a tile has been updated in memory, before anything of it is written to disk."""
        if MemoryTier.NVME in _tiers_of(job, tile):
            self._note(job, tile, TileStage.UPDATED, ring)

    def note_written(self, job: UpdateJob, tile: int, ring: int | None) -> None:
        """Note that what is on disk of a tile is new, before its ring buffer is used again."""
        if MemoryTier.NVME in _tiers_of(job, tile):
            self._note(job, tile, TileStage.WRITTEN, ring)

    def _note(self, job: UpdateJob, tile: int, stage: TileStage, ring: int | None) -> None:
        assert ring is not None
        word = job.sequence << 32 | stage << 16 | ring
        self.file.put_word(self._first_word[job.spec.chunk_id] + tile, word)

    # ---------------------------------------------------------------- what another process has left

    def find(self, chunk_id: int, tile: int) -> TileNote | None:
        """Return a tile's word; None: it has none."""
        word = int(self._words[self._first_word[chunk_id] + tile])
        return TileNote(word >> 32, TileStage(word >> 16 & 0xFFFF), word & 0xFFFF) if word else None

    def interrupted(self, sequence: int) -> list[InterruptedBlock]:
        """Return the blocks that are neither old nor new, with what they were before the update of a sequence."""
        found = []
        for thread in range(self._scratches.numel() // SCRATCH_NBYTES):
            scratch = read_scratch(self._scratches, thread)
            if scratch.sequence != sequence or int(self._blocks[scratch.block]) == sequence:
                continue
            chunk_id = max(c for c, first in self._first_block.items() if first <= scratch.block)
            found.append(InterruptedBlock(chunk_id, scratch.block - self._first_block[chunk_id], scratch))
        return found


def _tiers_of(job: UpdateJob, tile: int) -> tuple[MemoryTier, MemoryTier]:
    return job.state.tiers[tile], job.working.tiers[tile]
