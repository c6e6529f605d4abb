"""Finishes the updates of the last committed step, which another process has begun.

See [Note: Redo] in gemini.commits.journal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemini.commits.journal import TileStage, UpdateJournal
from gemini.kernels.journal import BLOCK_NUMEL
from gemini.update.job import UpdateJob
from gemini.update.pipeline import TilePipeline

__all__ = ["redo_updates"]


def redo_updates(jobs: Sequence[UpdateJob], pipeline: TilePipeline, journal: UpdateJournal, *, sequence: int) -> None:
    """Finish the updates of the last commit; blocks until memory and disk hold the new weights and state.

    May itself be interrupted and done again.

    Args:
        jobs: all updates of the last commit.
        pipeline: idle; its ring still holds what the other process left.
        journal: how far that came.
        sequence: the commit's.

    Raises:
        OffloadIOError: a read or write failed.
    """
    _restore_blocks({job.spec.chunk_id: job for job in jobs}, pipeline, journal, sequence=sequence)
    fresh: list[tuple[UpdateJob, int]] = []
    for job in jobs:
        for tile in job.tiles:
            note = journal.find(job.spec.chunk_id, tile)
            if note is None or note.sequence != sequence:
                fresh.append((job, tile))
            elif note.stage is not TileStage.WRITTEN:
                pipeline.resume(job, tile, note.ring, is_updated=note.stage is TileStage.UPDATED)
    for job, tile in fresh:
        pipeline.start(job, tile)
    while pipeline.is_busy:
        pipeline.push()
    pipeline.take_updated()
    for job in jobs:
        job.working.finish_writes()
        job.state.finish_writes()


def _restore_blocks(
    jobs: dict[int, UpdateJob], pipeline: TilePipeline, journal: UpdateJournal, *, sequence: int
) -> None:
    """Make the blocks old again that are neither old nor new."""
    for interrupted in journal.interrupted(sequence):
        job = jobs[interrupted.chunk_id]
        tile, begin = divmod(interrupted.block * BLOCK_NUMEL, pipeline.tile_numel)
        note = journal.find(interrupted.chunk_id, tile)
        ring = note.ring if note is not None and note.sequence == sequence else None
        image = interrupted.scratch.image
        for part in pipeline.parts(job, tile, ring):
            old = part[begin : begin + BLOCK_NUMEL].view(torch.uint8)
            old.copy_(image[: old.numel()])
            image = image[old.numel() :]
