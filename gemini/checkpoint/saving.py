"""Saving a training checkpoint: everything a run needs to go on with the same bits, whatever it runs on next.

Of each trainable parameter the float32 master and the moments are kept, by name, as runs of its elements: neither the
placement nor the chunks nor the number of ranks leaves a trace. Each rank writes what it owns, a tile at a time, from
wherever it lives.

[Note: Saving while training goes on]
Between two optimizer steps nobody changes state: what is updated ahead of a step goes to spare places. So a save may go
on in a thread of its own until the next step, which waits for it, and needs no second copy of anything. State on a
device is saved first, in the caller's thread, which owns the device's streams.
"""

from __future__ import annotations

import logging
import os
import threading
import zlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gemini.checkpoint.directory import CheckpointDirectory, name_of, write_durably
from gemini.checkpoint.manifest import (
    FileRecord,
    Manifest,
    ParamRecord,
    Piece,
    entry_name,
    run_state_name,
    weights_name,
)
from gemini.checkpoint.participants import Participants, division_of, has_copy_elsewhere, rank_of
from gemini.checkpoint.run_state import collect_run_state, encode_run_state
from gemini.chunk.layout import ParamPlace
from gemini.errors import ConfigError, GeminiError
from gemini.files.safetensors import SafetensorsWriter
from gemini.ranks.agreement import agree, on_all_ranks
from gemini.runtime.runtime import Runtime
from gemini.tiers import MemoryTier
from gemini.weights.values import kinds_of, owned_run, read_parts

__all__ = ["PendingSave", "save_checkpoint"]

logger = logging.getLogger(__name__)


def save_checkpoint(
    runtime: Runtime,
    path: Path,
    participants: Participants,
    *,
    extra: Any,
    keep_last: int | None,
    with_frozen: bool,
) -> PendingSave:
    """Start saving; see GeminiDDP.save_checkpoint."""
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise ConfigError(f"save_checkpoint: keep_last: expected at least 1, or None for all, got {keep_last!r}")
    if runtime.steps.has_gradients():
        raise ConfigError(
            "save_checkpoint: gradients wait for a step and would be lost: call it after optimizer.step(), or drop "
            "them with optimizer.zero_grad()"
        )
    runtime.finish_updates()
    save = PendingSave(runtime, CheckpointDirectory(path), keep_last=keep_last, with_frozen=with_frozen)
    save.begin(participants, extra)
    return save


class PendingSave:
    """A checkpoint that is being written while training goes on. The next optimizer step waits for it.

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
        self._step = runtime.steps.num_steps
        self._rank = rank_of(runtime)
        places = runtime.layout.place_by_name.values()
        self._places = [place for place in places if with_frozen or place.chunk_id in runtime.states]
        self._writer: SafetensorsWriter | None = None
        self._run_state = b""
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
            self._runtime.saving.release(self)
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
                run_state = collect_run_state(self._runtime, participants, extra, is_for_all=True)
                self._run_state = encode_run_state(run_state)
                if self._rank == 0:
                    self._directory.begin()
            try:
                self._open()
                self._append(place for place in self._places if self._is_on_device(place))
            except Exception as error:
                self._error = error
            self._runtime.saving.hold(self)
            self._thread.start()
        except BaseException:
            if self._thread.ident is not None:
                self._thread.join()
            self._is_over = True
            self._runtime.saving.release(self)
            self._abort()
            raise

    def _run_of(self, place: ParamPlace) -> slice:
        """Return which elements of its part of a parameter this rank saves."""
        return slice(0, 0) if has_copy_elsewhere(self._runtime, place) else owned_run(self._runtime, place)

    def _is_on_device(self, place: ParamPlace) -> bool:
        homes = (self._runtime.states.get(place.chunk_id), self._runtime.core.chunks[place.chunk_id].home)
        return any(MemoryTier.DEVICE in home.tiers for home in homes if home is not None)

    def _open(self) -> None:
        directory = self._directory.place
        write_durably(directory / run_state_name(self._rank), self._run_state)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for place in self._places:
            dtype = torch.float32 if place.chunk_id in self._runtime.states else place.spec.dtype
            run = self._run_of(place)
            for kind in kinds_of(self._runtime, place):
                tensors[entry_name(kind, place.spec.name)] = (dtype, (run.stop - run.start,))
        self._writer = SafetensorsWriter(directory / weights_name(self._rank), tensors)

    def _append(self, places: Iterable[ParamPlace]) -> None:
        assert self._writer is not None
        for place in places:
            if has_copy_elsewhere(self._runtime, place):
                continue
            for part in read_parts(self._runtime, place):
                for kind, values in part.items():
                    self._writer.append(entry_name(kind, place.spec.name), values)

    def _abort(self) -> None:
        if self._writer is not None:
            self._writer.abort()
        self._directory.abandon()

    def _write(self) -> None:
        """Write what is not on a device; in a thread of its own."""
        if self._error is None:
            try:
                assert self._writer is not None
                self._append(place for place in self._places if not self._is_on_device(place))
                self._writer.close()
            except Exception as error:  # whatever it is, `wait` raises it
                self._error = error
        if self._runtime.sharding.is_alone:
            self._complete()

    def _complete(self) -> None:
        """Let the checkpoint count once all ranks have written their parts; all ranks call."""
        try:
            agree(self._runtime.sharding, self._error)
            summaries = agree(self._runtime.sharding, None, self._summary())
            number = 0
            with on_all_ranks(self._runtime.sharding):
                if self._rank == 0:
                    number = self._directory.commit(self._manifest(summaries), keep_last=self._keep_last)
            (number,) = agree(self._runtime.sharding, None, [number])[0]
            self._path = self._directory.path / name_of(self._step, number)
        except Exception as error:
            self._error = error
            self._abort()

    def _summary(self) -> list[int]:
        """Return what the first rank must know of this one's files."""
        assert self._writer is not None
        summary = [self._writer.nbytes, len(self._run_state), zlib.crc32(self._run_state)]
        for place in self._places:
            run = self._run_of(place)
            checksums = (
                self._writer.checksums[entry_name(kind, place.spec.name)] for kind in kinds_of(self._runtime, place)
            )
            part = 0 if place.spec.split is None else place.spec.split.rank
            summary += [part, run.start, run.stop, *checksums]
        return summary

    def _manifest(self, summaries: list[list[int]]) -> Manifest:
        """Describe the checkpoint from all ranks' summaries."""
        kinds = {place.spec.name: kinds_of(self._runtime, place) for place in self._places}
        files: dict[str, FileRecord] = {}
        for rank, summary in enumerate(summaries):
            numbers = iter(summary)
            weights_nbytes, state_nbytes, state_checksum = islice(numbers, 3)
            pieces = {}
            for place in self._places:
                name = place.spec.name
                part, begin, end = islice(numbers, 3)
                checksums = dict(zip(kinds[name], islice(numbers, len(kinds[name])), strict=True))
                if begin < end or not place.spec.numel:
                    pieces[name] = Piece(part, begin, end, checksums)
            files[weights_name(rank)] = FileRecord(weights_nbytes, None, pieces)
            files[run_state_name(rank)] = FileRecord(state_nbytes, state_checksum, {})
        params = {
            place.spec.name: ParamRecord(place.spec.full_shape, kinds[place.spec.name], division_of(place))
            for place in self._places
        }
        return Manifest(self._step, len(summaries), params, files)
