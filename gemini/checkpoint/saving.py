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
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemini.checkpoint.directory import CheckpointDirectory, name_of, write_durably
from gemini.checkpoint.manifest import (
    STATE_KINDS,
    WEIGHT_KIND,
    FileRecord,
    Manifest,
    ParamRecord,
    Piece,
    entry_name,
    state_name,
    weights_name,
)
from gemini.checkpoint.run_state import encode_run_state, rng_state
from gemini.checkpoint.stateful import CheckpointedOptimizer, Stateful, rank_of
from gemini.chunk.layout import ParamSlot
from gemini.errors import CheckpointError, ConfigError, GeminiError
from gemini.runtime import Runtime
from gemini.safetensors_file import SafetensorsWriter
from gemini.tiers import MemoryTier
from gemini.weights import owned_run, read_state, read_working

__all__ = ["PendingSave", "save_checkpoint"]

logger = logging.getLogger(__name__)


def save_checkpoint(
    runtime: Runtime,
    path: Path,
    *,
    buffers: Mapping[str, torch.Tensor],
    optimizer: CheckpointedOptimizer | None,
    scheduler: Stateful | None,
    extra: Any,
    keep_last: int | None,
    with_frozen: bool,
) -> PendingSave:
    """Start saving; see GeminiDDP.save_checkpoint."""
    if keep_last is not None and keep_last < 1:
        raise ConfigError(f"save_checkpoint: keep_last: expected at least 1, or None for all, got {keep_last!r}")
    if runtime.gradients.num_backwards:
        raise ConfigError(
            "save_checkpoint: gradients wait for a step and would be lost: call it after optimizer.step(), or drop "
            "them with optimizer.zero_grad()"
        )
    runtime.finish_updates()
    small: dict[str, Any] = {"rng": rng_state()}
    if rank_of(runtime) == 0:
        small |= {
            "extra": extra,
            "buffers": {name: buffer.detach().cpu() for name, buffer in buffers.items()},
            "optimizer": None if optimizer is None else optimizer.hyper_state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if runtime.scaler is None else runtime.scaler.state_dict(),
            "num_skipped_steps": runtime.num_skipped_steps,
            "expected_backwards": runtime.gradients.expected_backwards,
        }
    save = PendingSave(runtime, CheckpointDirectory(path), keep_last=keep_last)
    save.begin(encode_run_state(small), with_frozen=with_frozen)
    runtime.saving.hold(save)
    return save


class PendingSave:
    """A checkpoint that is being written while training goes on. The next optimizer step waits for it.

    Args:
        runtime: the engine's.
        directory: where to.
        keep_last: complete checkpoints to keep.
    """

    def __init__(self, runtime: Runtime, directory: CheckpointDirectory, *, keep_last: int | None) -> None:
        self._runtime = runtime
        self._directory = directory
        self._keep_last = keep_last
        self._step = runtime.num_steps
        self._name = ""
        self._is_first = rank_of(runtime) == 0
        slots = list(runtime.layout.slot_by_name.values())
        self._trainable = [slot for slot in slots if slot.chunk_id in runtime.states]
        self._frozen = [slot for slot in slots if slot.chunk_id not in runtime.states]
        self._writer: SafetensorsWriter | None = None
        self._state_record = FileRecord(0, 0, {})
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_done(self) -> bool:
        """Whether this rank has written its part."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path:
        """Block until the checkpoint is complete. With several ranks all call it, or take their next step.

        Returns:
            Its directory.

        Raises:
            OffloadIOError: it could not be written. There is no checkpoint; training may go on.
            CheckpointError: another rank could not write its part, likewise.
        """
        self._runtime.saving.release(self)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._runtime.sharding is not None:
                self._try(self._complete)
        if self._error is not None:
            raise self._error
        return self._directory.path / self._name

    def close(self) -> None:
        """Block until nothing of the engine is read any more, and say if the checkpoint is lost."""
        if self._thread is None:
            return
        self._thread.join()
        if self._runtime.sharding is not None:
            logger.error("the checkpoint %s was not completed: call wait() before the engine is closed", self._name)
        elif self._error is not None:
            logger.error("the checkpoint %s could not be written: %s", self._name, self._error)

    def begin(self, small_state: bytes, *, with_frozen: bool) -> None:
        """Write what must be written now, and start writing the rest.

        Args:
            small_state: this rank's, encoded.
            with_frozen: whether frozen parameters are saved too.

        Raises:
            OffloadIOError: the directory cannot be made.
            CheckpointError: likewise, on another rank.
        """
        (number,), *_ = self._gather([self._directory.next_number()])  # the first rank's
        self._name = name_of(self._step, number)
        if self._is_first:
            self._try(partial(self._directory.begin, self._name))
        self._gather([])
        if self._error is not None:
            raise self._error
        if not with_frozen:
            self._frozen = []
        self._try(lambda: self._open(small_state))
        now = [slot for slot in self._trainable if self._is_on_device(slot)]
        later = [slot for slot in self._trainable if not self._is_on_device(slot)]
        self._append_states(now)
        for slot in self._frozen:
            values = read_working(self._runtime, slot)  # by all ranks together
            if self._is_first:
                self._try(partial(self._append, slot, {WEIGHT_KIND: values.reshape(-1)}))
        self._thread = threading.Thread(target=self._write, args=(later,), name="gemini-save", daemon=True)
        self._thread.start()

    def _is_on_device(self, slot: ParamSlot) -> bool:
        homes = (self._runtime.states[slot.chunk_id], self._runtime.core.chunks[slot.chunk_id].home)
        return any(MemoryTier.DEVICE in home.tiers for home in homes)

    def _try(self, action: Callable[[], Any]) -> None:
        """Do something unless something has failed; remember if it fails, so that other ranks hear of it."""
        if self._error is None:
            try:
                action()
            except (GeminiError, OSError) as error:
                self._error = error

    def _open(self, small_state: bytes) -> None:
        place, rank = self._directory.place_of(self._name), rank_of(self._runtime)
        write_durably(place / state_name(rank), small_state)
        self._state_record = FileRecord(len(small_state), zlib.crc32(small_state), {})
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for slot in self._trainable:
            run = owned_run(self._runtime, slot)
            for kind in STATE_KINDS:
                tensors[entry_name(kind, slot.spec.name)] = (torch.float32, (run.stop - run.start,))
        for slot in self._frozen if self._is_first else ():
            tensors[entry_name(WEIGHT_KIND, slot.spec.name)] = (slot.spec.dtype, (slot.spec.numel,))
        self._writer = SafetensorsWriter(place / weights_name(rank), tensors)

    def _append(self, slot: ParamSlot, values: Mapping[str, torch.Tensor]) -> None:
        assert self._writer is not None
        for kind, part in values.items():
            self._writer.append(entry_name(kind, slot.spec.name), part)

    def _append_states(self, slots: Iterable[ParamSlot]) -> None:
        for slot in slots:
            for part in read_state(self._runtime, slot) if self._error is None else ():
                values = {"master": part.master, "exp_avg": part.momentum, "exp_avg_sq": part.variance}
                self._try(partial(self._append, slot, values))

    def _write(self, slots: list[ParamSlot]) -> None:
        self._try(partial(self._append_states, slots))
        if self._writer is not None:
            self._try(self._writer.close)
        if self._runtime.sharding is None:
            self._try(self._complete)

    # ---------------------------------------------------------------- together with other ranks

    def _gather(self, values: list[int]) -> list[list[int]]:
        """Return what all ranks give; if one has failed, fail as well."""
        own = [int(self._error is None), *values]
        table = [own]
        if self._runtime.sharding is not None:
            table = self._runtime.sharding.group.gather_values(torch.tensor(own), name="a checkpoint").tolist()
        failed = [rank for rank, row in enumerate(table) if not row[0]]
        if failed and self._error is None:
            ranks = ", ".join(map(str, failed))
            self._error = CheckpointError(
                f"rank {ranks} could not write its part of the checkpoint in {self._directory.path}; see its own error"
            )
        return [row[1:] for row in table]

    def _complete(self) -> None:
        """Let the checkpoint count once all ranks have written their parts."""
        table = self._gather(self._summary())
        if self._error is None and self._is_first:
            files: dict[str, FileRecord] = {}
            for rank, row in enumerate(table):
                files |= self._records(rank, row)
            manifest = Manifest(self._step, len(table), self._params(), files)
            self._try(partial(self._directory.commit, self._name, manifest, keep_last=self._keep_last))
        self._gather([])
        if self._error is not None and self._is_first:
            self._directory.abandon(self._name)

    def _summary(self) -> list[int]:
        """Return what the first rank must know of this one's files: as many numbers whatever has happened."""
        summary = [0 if self._writer is None else self._writer.nbytes, self._state_record.nbytes]
        summary.append(self._state_record.checksum or 0)
        for slot in self._trainable:
            run = owned_run(self._runtime, slot)
            checksums = {} if self._writer is None else self._writer.checksums
            kinds = (entry_name(kind, slot.spec.name) for kind in STATE_KINDS)
            summary += [run.start, run.stop, *(checksums.get(name, 0) for name in kinds)]
        return summary

    def _records(self, rank: int, summary: list[int]) -> dict[str, FileRecord]:
        """Return a rank's files from its summary; on the first rank."""
        weights_nbytes, state_nbytes, state_checksum, *rest = summary
        pieces = {}
        for i, slot in enumerate(self._trainable):
            begin, end, *checksums = rest[5 * i : 5 * i + 5]
            if begin < end or not slot.spec.numel:
                pieces[slot.spec.name] = Piece(begin, end, dict(zip(STATE_KINDS, checksums, strict=True)))
        for slot in self._frozen if rank == 0 else ():
            assert self._writer is not None
            checksum = self._writer.checksums[entry_name(WEIGHT_KIND, slot.spec.name)]
            pieces[slot.spec.name] = Piece(0, slot.spec.numel, {WEIGHT_KIND: checksum})
        return {
            weights_name(rank): FileRecord(weights_nbytes, None, pieces),
            state_name(rank): FileRecord(state_nbytes, state_checksum, {}),
        }

    def _params(self) -> dict[str, ParamRecord]:
        trainable = {slot.spec.name: ParamRecord(tuple(slot.spec.shape), True) for slot in self._trainable}
        return trainable | {slot.spec.name: ParamRecord(tuple(slot.spec.shape), False) for slot in self._frozen}
