"""Loads a training checkpoint into an engine of the same model, with any placement, chunks or ranks.

Each rank takes what it owns from whichever files have it, a tile at a time. What can be checked is checked before
anything is changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemini.checkpoint.directory import find_checkpoint, read_manifest
from gemini.checkpoint.manifest import Division, FileRecord, Manifest, entry_name, find_pieces, run_state_name
from gemini.checkpoint.participants import Participants, division_of, rank_of, world_size_of
from gemini.checkpoint.run_state import (
    check_buffers,
    check_run_state,
    decode_run_state,
    load_scheduler,
    restore_rng,
    restore_run_state,
)
from gemini.chunk.layout import ParamPlace
from gemini.errors import CheckpointError, CheckpointMismatchError, naming_file
from gemini.files.safetensors import SafetensorsReader, checksum_of
from gemini.ranks.agreement import agree, on_all_ranks
from gemini.runtime.runtime import Runtime
from gemini.weights.values import FROZEN_KINDS, kinds_of, loading, write_parts

__all__ = ["LoadedCheckpoint", "load_checkpoint"]

CHECKED_NUMEL = 1 << 22
"""Elements that are read at once to be checked."""


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """The result of `load_checkpoint`."""

    path: Path
    """The checkpoint's own directory."""
    step: int
    """Optimizer steps that had been taken when it was saved."""
    extra: Any
    """Data that the user saved as `extra`."""


def load_checkpoint(runtime: Runtime, path: Path, participants: Participants, *, verify: bool) -> LoadedCheckpoint:
    """Load everything; see GeminiDDP.load_checkpoint."""
    runtime.finish_updates()
    with ExitStack() as stack:
        with on_all_ranks(runtime.sharding):
            path = find_checkpoint(path)
            manifest = read_manifest(path)
            _check_params(runtime, manifest, path)
            state = _read_run_state(path, manifest, 0)
            check_run_state(state, participants, source=f"load_checkpoint: {path}")
            rank = rank_of(runtime)
            own = _read_run_state(path, manifest, rank) if rank < manifest.world_size else None
            of_rank = own if own is not None and manifest.world_size == world_size_of(runtime) else state
            check_buffers(of_rank, participants, source=f"load_checkpoint: {path}")
            files = _open_files(path, manifest, stack)
            if verify:
                names = list(files)[rank :: world_size_of(runtime)]
                for name in names:
                    _verify_file(files[name], manifest.files[name])
        _check_same(runtime, manifest, path)
        with on_all_ranks(runtime.sharding):
            if participants.scheduler is not None:
                load_scheduler(participants.scheduler, state["scheduler"], source=f"load_checkpoint: {path}")
        runtime.steps.clear_gradients()
        try:
            with loading(runtime), on_all_ranks(runtime.sharding):
                _load_params(runtime, files, manifest)
                restore_run_state(runtime, participants, state, of_rank)
        except BaseException as error:
            runtime.updates.failure = f"loading {path} failed before it was complete ({error or type(error).__name__})"
            raise
    runtime.steps.resume_at(manifest.step)
    if own is not None:
        restore_rng(own)
    return LoadedCheckpoint(path, manifest.step, state["extra"])


def _check_same(runtime: Runtime, manifest: Manifest, path: Path) -> None:
    """Raise CheckpointError unless all ranks have found the same checkpoint."""
    found = agree(runtime.sharding, None, [zlib.crc32(manifest.to_json().encode())])
    others = [rank for rank, checksum in enumerate(found) if checksum != found[0]]
    if others:
        raise CheckpointError(
            f"load_checkpoint: {path}: rank 0 and rank {others[0]} see different checkpoints; give all ranks the "
            "same shared directory"
        )


def _check_params(runtime: Runtime, manifest: Manifest, path: Path) -> None:
    """Raise CheckpointMismatchError unless a checkpoint is of this model."""
    places = runtime.layout.place_by_name
    trainable = {name for name, place in places.items() if place.chunk_id in runtime.states}
    has_frozen = any(param.kinds == FROZEN_KINDS for param in manifest.params.values())
    missing = sorted((places.keys() if has_frozen else trainable) - manifest.params.keys())
    unexpected = sorted(manifest.params.keys() - places.keys())
    if missing or unexpected:
        raise CheckpointMismatchError(
            f"load_checkpoint: {path} is of another model: it lacks {_some(missing)} and has {_some(unexpected)} "
            "besides"
        )
    for name, param in manifest.params.items():
        if param.shape != places[name].spec.full_shape:
            raise CheckpointMismatchError(
                f"load_checkpoint: {name} has shape {param.shape} in {path}, the model's has "
                f"{places[name].spec.full_shape}"
            )
        if param.kinds != kinds_of(runtime, places[name]):
            was, now = ("trainable", "frozen") if name not in trainable else ("frozen", "trainable")
            raise CheckpointMismatchError(
                f"load_checkpoint: {name} was {was} when {path} was saved and is {now} now; set requires_grad as it "
                "was before the model is wrapped"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_run_state(path: Path, manifest: Manifest, rank: int) -> dict[str, Any]:
    name = run_state_name(rank)
    record = manifest.files.get(name)
    if record is None:
        raise CheckpointError(f"{path}: {name} is missing from the manifest; take another checkpoint")
    with naming_file("read", path / name):
        data = (path / name).read_bytes()
    if zlib.crc32(data) != record.checksum:
        raise CheckpointError(f"{path / name} is damaged: its checksum is wrong; take another checkpoint")
    return decode_run_state(data, source=path / name)


def _open_files(path: Path, manifest: Manifest, stack: ExitStack) -> dict[str, SafetensorsReader]:
    """Open the files of parameters, and make sure that they hold what the manifest says."""
    files = {}
    for name, record in manifest.files.items():
        if record.pieces:
            files[name] = stack.enter_context(SafetensorsReader(path / name))
            _check_entries(files[name], record)
    return files


def _check_entries(file: SafetensorsReader, record: FileRecord) -> None:
    for param, piece in record.pieces.items():
        for kind in piece.checksums:
            entry = file.entries.get(entry_name(kind, param))
            numel = piece.end - piece.begin
            if entry is None or entry.numel != numel or not (entry.dtype is torch.float32 or kind in FROZEN_KINDS):
                raise CheckpointError(
                    f"{file.path} is damaged: expected {numel} elements of {kind} of {param}; take another checkpoint"
                )


def _verify_file(file: SafetensorsReader, record: FileRecord) -> None:
    """Raise CheckpointError if a checksum is wrong."""
    for param, piece in record.pieces.items():
        numel = piece.end - piece.begin
        for kind, expected in piece.checksums.items():
            checksum = 0
            for begin in range(0, numel, CHECKED_NUMEL):
                values = file.read(entry_name(kind, param), begin, min(begin + CHECKED_NUMEL, numel))
                checksum = checksum_of(values, checksum)
            if checksum != expected:
                raise CheckpointError(
                    f"{file.path} is damaged: the checksum of {kind} of {param} is wrong; take another checkpoint"
                )


def _load_params(runtime: Runtime, files: Mapping[str, SafetensorsReader], manifest: Manifest) -> None:
    for name in manifest.params:
        place = runtime.layout.place_by_name[name]
        write_parts(runtime, place, partial(_read_run, files, manifest, place))


def _read_run(
    files: Mapping[str, SafetensorsReader], manifest: Manifest, place: ParamPlace, kind: str, begin: int, end: int
) -> torch.Tensor:
    """Return elements [begin, end) of this rank's part of a parameter from the files that have them."""
    param = place.spec.name
    runs = []
    for run in _saved_runs(manifest.params[param].division, place, begin, end):
        for name, piece in find_pieces(manifest, param, *run):
            low, high = max(run[1], piece.begin), min(run[2], piece.end)
            runs.append(files[name].read(entry_name(kind, param), low - piece.begin, high - piece.begin))
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _saved_runs(saved: Division, place: ParamPlace, begin: int, end: int) -> Iterable[tuple[int, int, int]]:
    """Return where elements [begin, end) of this rank's part of a parameter are: saved parts, and runs in them."""
    part = 0 if place.spec.split is None else place.spec.split.rank
    wanted = division_of(place)
    if wanted == saved:
        return [(part, begin, end)]
    return (run for whole in wanted.to_whole(part, begin, end) for run in saved.to_parts(*whole))
