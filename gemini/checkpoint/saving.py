"""Saves a training checkpoint: everything that a run needs to continue with the same bits on any machine.

The float32 master and the moments of each trainable parameter are saved by name, as runs of its elements. So a
checkpoint does not depend on the placement, the chunks or the number of ranks. A save is planned (`plan_save`), each
rank writes its part (`RankFiles`), the ranks agree that everything is complete, and the first rank publishes it.

[Note: Saving while training goes on]
State does not change between two optimizer steps: updates ahead of a step go to spare places. So a save can run in a
separate thread until the next step, which waits for it, and needs no second copy. State on a device is saved first, in
the caller's thread, which owns the device's streams.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

from gemini.checkpoint.directory import CheckpointDirectory, name_of
from gemini.checkpoint.participants import Participants, rank_of
from gemini.checkpoint.plan import SavedChunk, SavePlan, manifest_of, plan_save
from gemini.checkpoint.rank_files import RankFiles
from gemini.checkpoint.run_state import collect_run_state, encode_run_state
from gemini.chunk.chunk import Chunk
from gemini.errors import ConfigError, GeminiError
from gemini.ranks.agreement import agree, on_all_ranks
from gemini.runtime.runtime import Runtime
from gemini.tiers import MemoryTier

__all__ = ["CheckpointWriter", "save_checkpoint"]

logger = logging.getLogger(__name__)


def save_checkpoint(
    runtime: Runtime,
    path: Path,
    participants: Participants,
    *,
    extra: Any,
    keep_last: int | None,
    with_frozen: bool,
) -> CheckpointWriter:
    """Start saving; see GeminiDDP.save_checkpoint."""
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise ConfigError(f"save_checkpoint: keep_last: expected at least 1, or None for all, got {keep_last!r}")
    if runtime.steps.has_gradients():
        raise ConfigError(
            "save_checkpoint: gradients wait for a step and would be lost: call it after optimizer.step(), or drop "
            "them with optimizer.zero_grad()"
        )
    runtime.finish_updates()
    save = CheckpointWriter(runtime, CheckpointDirectory(path), keep_last=keep_last, with_frozen=with_frozen)
    save.begin(participants, extra)
    return save


class CheckpointWriter:
    """A checkpoint that is being written while training continues. The next optimizer step waits for it.

    Args:
        runtime: the engine's.
        directory: where to.
        keep_last: complete checkpoints to keep.
        with_frozen: whether frozen parameters are saved too.
    """

    def __init__(
        self, runtime: Runtime, directory: CheckpointDirectory, *, keep_last: int | None, with_frozen: bool
    ) -> None:
        self._runtime = runtime
        self._directory = directory
        self._keep_last = keep_last
        self._with_frozen = with_frozen
        self._step = runtime.steps.num_steps
        self._rank = rank_of(runtime)
        self._files: RankFiles | None = None
        self._thread = threading.Thread(
            target=self._write, name="gemini-save", daemon=False
        )  # the process waits for it
        self._pid = os.getpid()
        self._is_over = False
        self._error: Exception | None = None
        self._path: Path | None = None

    @property
    def is_done(self) -> bool:
        """Whether this rank has written its part."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """Block until the checkpoint is complete. With several ranks all call it, or take their next step.

        Returns:
            Its directory.

        Raises:
            OffloadIOError: it could not be written. There is no checkpoint; training may go on.
            CheckpointError: another rank could not write its part, likewise.
            CollectiveError: a rank has died, stalled or gone another way.
        """
        if not self._is_over:
            self._thread.join()
            self._is_over = True
            self._runtime.pending_save.release(self)
            if not self._runtime.sharding.is_alone:
                self._complete()
        if self._error is not None:
            raise self._error
        assert self._path is not None
        return self._path

    def close(self) -> None:
        """Block until nothing of the engine is read any more, and say if the checkpoint is lost."""
        if os.getpid() != self._pid:
            return  # the child of a fork, in which nobody writes
        self._thread.join()
        self._is_over = True
        if self._error is None and self._path is None:
            self._error = GeminiError("wait() was not called before the engine was closed")
            self._directory.abandon()
        if self._error is not None:
            logger.error("the checkpoint of step %d in %s is lost: %s", self._step, self._directory.path, self._error)

    def begin(self, participants: Participants, extra: Any) -> None:
        """Write what must be written now, and start writing the rest.

        Args:
            participants: whose state is saved.
            extra: to be kept as well.

        Raises:
            OffloadIOError: the directory cannot be made.
            ConfigError: something cannot be kept.
            CheckpointError: one of these on another rank.
        """
        try:
            with on_all_ranks(self._runtime.sharding):
                run_state = encode_run_state(collect_run_state(self._runtime, participants, extra, is_for_all=True))
                if self._rank == 0:
                    self._directory.begin()
            try:
                plan = _plan_of(self._runtime, with_frozen=self._with_frozen)
                self._files = RankFiles(self._runtime, plan, self._directory.place, run_state)
                self._files.write(plan.runs_at_once)
            except Exception as error:
                self._error = error
            self._runtime.pending_save.hold(self)
            self._thread.start()
        except BaseException:
            if self._thread.ident is not None:
                self._thread.join()
            self._is_over = True
            self._runtime.pending_save.release(self)
            self._abort()
            raise

    def _abort(self) -> None:
        if self._files is not None:
            self._files.abort()
        self._directory.abandon()

    def _write(self) -> None:
        """Write what is not on a device, in a separate thread."""
        if self._error is None:
            try:
                assert self._files is not None
                self._files.write(self._files.plan.runs_behind)
                self._files.close()
            except Exception as error:  # whatever it is, `wait` raises it
                self._error = error
        if self._runtime.sharding.is_alone:
            self._complete()

    def _complete(self) -> None:
        """Publish the checkpoint when all ranks have written their parts; all ranks call."""
        try:
            self._path = self._publish(self._agree())
        except Exception as error:
            self._error = error
            self._abort()

    def _agree(self) -> list[list[int]]:
        """Make sure that all ranks have written their parts; return their summaries."""
        agree(self._runtime.sharding, self._error)
        assert self._files is not None
        return agree(self._runtime.sharding, None, self._files.summary)

    def _publish(self, summaries: list[list[int]]) -> Path:
        """Give the checkpoint its name on the first rank; all ranks return it."""
        number = 0
        with on_all_ranks(self._runtime.sharding):
            if self._rank == 0:
                assert self._files is not None
                manifest = manifest_of(self._files.plan, summaries)
                number = self._directory.publish(manifest, keep_last=self._keep_last)
        (number,) = agree(self._runtime.sharding, None, [number])[0]
        return self._directory.path / name_of(self._step, number)


def _plan_of(runtime: Runtime, *, with_frozen: bool) -> SavePlan:
    """Plan what this rank saves of an engine's state as it is now."""
    return plan_save(
        [
            SavedChunk(spec=chunk.spec, shard=chunk.shard, is_on_device=_is_on_device(runtime, chunk))
            for chunk in runtime.core.chunks
        ],
        step=runtime.steps.num_steps,
        rank=rank_of(runtime),
        grid=runtime.sharding.group.grid,
        with_frozen=with_frozen,
    )


def _is_on_device(runtime: Runtime, chunk: Chunk) -> bool:
    homes = (runtime.states.get(chunk.spec.chunk_id), chunk.home)
    return any(MemoryTier.DEVICE in home.tiers for home in homes if home is not None)
