"""Claims the state that outlives a process, and finishes the last commit of an earlier process.

[Note: Commits of several ranks]
Each rank publishes its own record, and starts the updates when all ranks have published theirs. So killed ranks leave
records of one step, or of two consecutive steps. In the second case, no update of the newer step has begun, and that
step is withdrawn. All ranks then continue with the older record, which still exists, and with the state of its step.
Before weights or state are changed in another way, the last commit is dropped; this is published and agreed on in the
same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gemini.chunk.core import ChunkCore
from gemini.commits.file import CommitFile
from gemini.commits.journal import UpdateJournal
from gemini.commits.layout import CommitContent
from gemini.commits.record import CommittedStep, decode_record
from gemini.commits.redo import redo_updates
from gemini.errors import CheckpointMismatchError
from gemini.gradients.arrivals import Gradients
from gemini.offload.home import TiledHome
from gemini.offload.swap_file import KeptSwap
from gemini.ranks.agreement import agree, on_all_ranks
from gemini.ranks.sharding import Sharding
from gemini.update.job import NoProgressLog, ProgressLog, UpdateJob
from gemini.update.pipeline import TilePipeline, tiles_of

__all__ = ["ClaimedCommits", "Commits", "NoCommits", "common_sequence"]

logger = logging.getLogger(__name__)

WHAT = "claiming the commit files"


class Commits(Protocol):
    """Commits of an engine, whose steps then outlive its process."""

    @property
    def log(self) -> ProgressLog:
        """Gets the progress of updates; also the source of memory for trainable chunks."""
        ...

    @property
    def file(self) -> CommitFile | None:
        """The commit file; None if nothing is committed."""
        ...

    @property
    def step(self) -> CommittedStep | None:
        """Last committed step when the engine was built; None if there was none, so it began with initial weights."""
        ...

    @property
    def swap(self) -> KeptSwap | None:
        """The swap file that belongs to the commit file."""
        ...

    @property
    def has_record(self) -> bool:
        """Whether there is a committed step from which the next engine would continue."""
        ...

    def redo(
        self,
        core: ChunkCore,
        states: Mapping[int, TiledHome],
        gradients: Gradients,
        pipeline: TilePipeline,
    ) -> None:
        """Finish the updates of `step`, if there is one; see gemini.commits.redo."""

    def drop(self) -> None:
        """Drop the committed step."""

    def close(self) -> None:
        """Close the file."""


class NoCommits:
    """An engine without commits: nothing outlives the process; see Commits."""

    log = NoProgressLog()
    file = None
    step = None
    swap = None
    has_record = False

    def redo(
        self,
        core: ChunkCore,
        states: Mapping[int, TiledHome],
        gradients: Gradients,
        pipeline: TilePipeline,
    ) -> None:
        """Return: no update was interrupted."""

    def drop(self) -> None:
        """Return: there is none."""

    def close(self) -> None:
        """Return: nothing is open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedCommits:
    """A claimed commit file; see Commits."""

    log: UpdateJournal
    step: CommittedStep | None
    swap: KeptSwap

    @property
    def file(self) -> CommitFile:
        """The commit file."""
        return self.log.file

    @property
    def has_record(self) -> bool:
        """Whether there is a committed step from which the next engine would continue."""
        return self.file.has_record

    def drop(self) -> None:
        """Drop the committed step."""
        self.file.drop()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @staticmethod
    def claim(file: CommitFile, content: CommitContent, sharding: Sharding) -> ClaimedCommits:
        """Claim a commit file for an engine, see [Note: Commits of several ranks]; with several ranks all call.

        Args:
            file: open.
            content: of the engine.
            sharding: the ranks, which have a file each.

        Returns:
            What all ranks have committed.

        Raises:
            CheckpointMismatchError: ranks have committed other steps, or a file is another engine's.
            CheckpointError: a file is damaged.
            CollectiveError: a rank did not take part.
            ConfigError, OutOfTierMemoryError: as for CommitFile.claim.
        """
        with on_all_ranks(sharding, what=WHAT):
            file.claim(content.commits, fingerprint=content.fingerprint(), text=content.describe())
        sequence = common_sequence(sharding, file)
        with on_all_ranks(sharding, what=WHAT):
            record = file.resume(sequence)
        return ClaimedCommits(
            log=UpdateJournal(file, content.numels, tile_numel=content.shape.tile_numel),
            step=None if record is None else decode_record(record.content),
            swap=KeptSwap(identity=file.identity, has_content=record is not None),
        )

    def redo(
        self,
        core: ChunkCore,
        states: Mapping[int, TiledHome],
        gradients: Gradients,
        pipeline: TilePipeline,
    ) -> None:
        """Finish the updates of the last commit, if there is one; see gemini.commits.redo."""
        if self.step is None:
            return
        jobs = [
            UpdateJob(
                spec=core.chunks[chunk_id].home_spec,
                working=core.chunks[chunk_id].home,
                state=states[chunk_id],
                grad=gradients.home_of(chunk_id),
                grad_dtype=gradients.dtype_of(chunk_id),
                segments=update.segments,
                grad_scale=update.grad_scale,
                tiles=tiles_of(update.segments, pipeline.tile_numel),
                sequence=self.file.sequence,
            )
            for chunk_id, update in self.step.planned.items()
        ]
        redo_updates(jobs, pipeline, self.log, sequence=self.file.sequence)


def common_sequence(sharding: Sharding, file: CommitFile | None) -> int:
    """Return the commit with which all ranks continue; with several ranks, all call.

    Args:
        sharding: the ranks.
        file: this rank's; None: it has none.

    Returns:
        The record's sequence; 0: there is none that all have.

    Raises:
        CheckpointMismatchError: the ranks' commits are not of one run.
        CollectiveError: a rank did not take part.
    """
    own = [0, False] if file is None else [file.sequence, file.has_record]
    table = agree(sharding, None, own, what=WHAT)
    sequences = [sequence for sequence, _ in table]
    oldest, newest = min(sequences), max(sequences)
    found = ", ".join(f"{sequence} on the {i + 1}." for i, sequence in enumerate(sequences))
    if oldest > 0 and newest - oldest > 1:
        raise CheckpointMismatchError(
            f"the ranks' commit files belong to different runs (commits so far: {found} rank): give all ranks the "
            "files of one run, or new ones"
        )
    if oldest == 0 and newest > 1:
        logger.warning("the commits of some ranks are dropped, because other ranks have none (%s rank)", found)
    return oldest if all(has_record for sequence, has_record in table if sequence == oldest) else 0
