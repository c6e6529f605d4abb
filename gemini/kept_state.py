"""What of an engine outlives its process: claim it, and bring what another process has left to its last commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemini.blueprint import Blueprint
from gemini.chunk.core import ChunkCore
from gemini.commit_plan import describe_content, fingerprint_content
from gemini.commit_record import CommittedStep, decode_record
from gemini.gradients import GradientStore
from gemini.offload.commit_file import CommitFile
from gemini.offload.home import TiledHome
from gemini.offload.swap_file import KeptSwap
from gemini.redo import redo_updates
from gemini.sharded_gradients import ShardedGradients
from gemini.update import TilePipeline, UpdateJob, tiles_of
from gemini.update_journal import UpdateJournal

__all__ = ["KeptState"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """A claimed commit file."""

    journal: UpdateJournal
    step: CommittedStep | None
    """What was committed last; None: nothing, so that the engine begins with its first weights."""
    swap: KeptSwap
    """The swap file that belongs to it."""

    @staticmethod
    def claim(file: CommitFile, blueprint: Blueprint) -> KeptState:
        """Claim a commit file for an engine; errors as for CommitFile.claim."""
        layout, plan, shape, commits = blueprint.layout, blueprint.plan, blueprint.shape, blueprint.commits
        assert commits is not None
        record = file.claim(
            commits,
            fingerprint=fingerprint_content(layout, blueprint.shards, plan, shape, commits),
            text=describe_content(layout, plan, shape, commits),
        )
        numels = {demand.chunk_id: demand.numel for demand in blueprint.demands if demand.is_trainable}
        return KeptState(
            journal=UpdateJournal(file, numels, tile_numel=shape.tile_numel),
            step=None if record is None else decode_record(record.content),
            swap=KeptSwap(identity=file.identity, has_content=record is not None),
        )

    def redo(
        self,
        core: ChunkCore,
        states: Mapping[int, TiledHome],
        gradients: GradientStore | ShardedGradients,
        pipeline: TilePipeline,
    ) -> None:
        """Finish the updates of the last commit, if there is one; see gemini.redo."""
        if self.step is None:
            return
        jobs = [
            UpdateJob(
                spec=core.chunks[chunk_id].home_spec,
                working=core.chunks[chunk_id].home,
                state=states[chunk_id],
                grad=gradients.home_of(chunk_id),
                grad_dtype=gradients.dtype_of(chunk_id),
                segments=wish.segments,
                grad_scale=wish.grad_scale,
                tiles=tiles_of(wish.segments, pipeline.tile_numel),
                sequence=self.journal.file.sequence,
            )
            for chunk_id, wish in self.step.wishes.items()
        ]
        redo_updates(jobs, pipeline, self.journal, sequence=self.journal.file.sequence)
