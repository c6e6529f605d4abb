"""Loading a training checkpoint into an engine of the same model, whatever placement, chunks or ranks it has.

Each rank takes what it owns from whichever files have it, a tile at a time. What can be checked is checked before
anything is changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemini.checkpoint.directory import find_checkpoint, read_manifest
from gemini.checkpoint.manifest import (
    STATE_KINDS,
    WEIGHT_KIND,
    FileRecord,
    Manifest,
    entry_name,
    find_pieces,
    state_name,
)
from gemini.checkpoint.run_state import decode_run_state, set_rng_state
from gemini.checkpoint.stateful import CheckpointedOptimizer, Stateful, rank_of
from gemini.errors import CheckpointError, CheckpointMismatchError, ConfigError, GeminiError, OffloadIOError
from gemini.runtime import Runtime
from gemini.safetensors_file import SafetensorsReader, checksum_of
from gemini.weights import StatePart, load_master, write_state

__all__ = ["LoadedCheckpoint", "load_checkpoint"]

CHECKED_NUMEL = 1 << 22
"""Elements that are read at once to be checked."""


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """What `load_checkpoint` found."""

    path: Path
    """The checkpoint's own directory."""
    step: int
    """Optimizer steps that had been taken when it was saved."""
    extra: Any
    """What the user gave to be kept."""


def load_checkpoint(
    runtime: Runtime,
    path: Path,
    *,
    buffers: Mapping[str, torch.Tensor],
    optimizer: CheckpointedOptimizer | None,
    scheduler: Stateful | None,
    verify: bool,
) -> LoadedCheckpoint:
    """Load everything; see GeminiDDP.load_checkpoint."""
    runtime.finish_updates()
    runtime.clear_gradients()
    path = find_checkpoint(path)
    manifest = read_manifest(path)
    _check_params(runtime, manifest, path)
    state = _read_small_state(path, manifest, 0)
    if optimizer is None and state["optimizer"] is not None:
        raise ConfigError(
            "load_checkpoint: the checkpoint has an optimizer's state: construct HybridAdam(engine.parameters()) first"
        )
    if optimizer is not None and state["optimizer"] is not None:
        optimizer.check_hyper_state_dict(state["optimizer"])
    if scheduler is not None and state["scheduler"] is None:
        raise CheckpointMismatchError(f"load_checkpoint: scheduler: {path} was saved without one")
    _check_buffers(buffers, state["buffers"])
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(SafetensorsReader(path / name))
            for name, record in manifest.files.items()
            if record.pieces
        }
        _check_entries(files, manifest)
        if verify:
            _verify(runtime, files, manifest)
        try:
            _load_params(runtime, files, manifest)
        except BaseException as error:
            runtime.overlap.failure = f"loading {path} failed half way ({error})"
            raise
    for name, buffer in buffers.items():
        buffer.copy_(state["buffers"][name])
    if optimizer is not None and state["optimizer"] is not None:
        optimizer.load_hyper_state_dict(state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if runtime.scaler is not None and state["scaler"] is not None:
        runtime.scaler.load_state_dict(state["scaler"])
    runtime.num_steps = manifest.step
    runtime.num_skipped_steps = state["num_skipped_steps"]
    runtime.gradients.expected_backwards = state["expected_backwards"]
    if rank_of(runtime) < manifest.world_size:
        own = state if rank_of(runtime) == 0 else _read_small_state(path, manifest, rank_of(runtime))
        set_rng_state(own["rng"])
    return LoadedCheckpoint(path, manifest.step, state["extra"])


def _check_params(runtime: Runtime, manifest: Manifest, path: Path) -> None:
    """Raise CheckpointMismatchError unless a checkpoint is of this model."""
    slots = runtime.layout.slot_by_name
    trainable = {name for name, slot in slots.items() if slot.chunk_id in runtime.states}
    missing = sorted(trainable - manifest.params.keys())
    unexpected = sorted(manifest.params.keys() - slots.keys())
    if missing or unexpected:
        raise CheckpointMismatchError(
            f"{path} is of another model: it lacks {_some(missing)} and has {_some(unexpected)} besides"
        )
    for name, param in manifest.params.items():
        if param.shape != tuple(slots[name].spec.shape):
            raise CheckpointMismatchError(
                f"{path}: {name} has shape {param.shape}, the model's has {tuple(slots[name].spec.shape)}"
            )
        if param.is_trainable != (name in trainable):
            was, now = ("trainable", "frozen") if param.is_trainable else ("frozen", "trainable")
            raise CheckpointMismatchError(f"{path}: {name} was {was} when it was saved and is {now} now")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_buffers(buffers: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        if name not in saved or saved[name].shape != buffer.shape:
            found = f"shape {tuple(saved[name].shape)}" if name in saved else "none"
            raise CheckpointMismatchError(
                f"load_checkpoint: buffer {name}: expected shape {tuple(buffer.shape)}, the checkpoint has {found}"
            )


def _read_small_state(path: Path, manifest: Manifest, rank: int) -> dict[str, Any]:
    name = state_name(rank)
    record = manifest.files.get(name)
    if record is None:
        raise CheckpointError(f"{path}: {name} is missing from the manifest; take another checkpoint")
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise OffloadIOError("read", str(path / name), error.errno or 0) from error
    if zlib.crc32(data) != record.checksum:
        raise CheckpointError(f"{path / name} is damaged: its checksum is wrong; take another checkpoint")
    return decode_run_state(data, source=path / name)


def _check_entries(files: Mapping[str, SafetensorsReader], manifest: Manifest) -> None:
    """Raise CheckpointError unless files hold what the manifest says."""
    for name, file in files.items():
        for param, piece in manifest.files[name].pieces.items():
            for kind in piece.checksums:
                entry = file.entries.get(entry_name(kind, param))
                if entry is None or entry.numel != piece.end - piece.begin:
                    raise CheckpointError(
                        f"{file.path} is damaged: expected {piece.end - piece.begin} elements of {kind} of {param}; "
                        "take another checkpoint"
                    )


def _verify(runtime: Runtime, files: Mapping[str, SafetensorsReader], manifest: Manifest) -> None:
    """Read every byte once, each rank a share of the files, before anything is changed.

    Args:
        runtime: the engine's.
        files: open, by name.
        manifest: the checkpoint's.

    Raises:
        CheckpointError: a checksum is wrong, here or on another rank.
    """
    error: GeminiError | None = None
    ranks = 1 if runtime.sharding is None else runtime.sharding.group.world_size
    try:
        for name in list(files)[rank_of(runtime) :: ranks]:
            _verify_file(files[name], manifest.files[name])
    except GeminiError as found:
        error = found
    if runtime.sharding is not None:
        is_bad = torch.tensor([int(error is not None)])
        bad = (
            runtime.sharding.group.gather_values(is_bad, name="a checkpoint's checksums")[:, 0].nonzero()[:, 0].tolist()
        )
        if bad and error is None:
            error = CheckpointError(
                f"load_checkpoint: rank {bad[0]} has found the checkpoint damaged; see its own error"
            )
    if error is not None:
        raise error


def _verify_file(file: SafetensorsReader, record: FileRecord) -> None:
    for param, piece in record.pieces.items():
        for kind, expected in piece.checksums.items():
            checksum = 0
            for begin in range(0, piece.end - piece.begin, CHECKED_NUMEL):
                end = min(begin + CHECKED_NUMEL, piece.end - piece.begin)
                checksum = checksum_of(file.read(entry_name(kind, param), begin, end), checksum)
            if checksum != expected:
                raise CheckpointError(
                    f"{file.path} is damaged: the checksum of {kind} of {param} is wrong; take another checkpoint"
                )


def _load_params(runtime: Runtime, files: Mapping[str, SafetensorsReader], manifest: Manifest) -> None:
    def read(kind: str, param: str, begin: int, end: int) -> torch.Tensor:
        parts = []
        for name, piece in find_pieces(manifest, param, begin, end):
            low, high = max(begin, piece.begin), min(end, piece.end)
            parts.append(files[name].read(entry_name(kind, param), low - piece.begin, high - piece.begin))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_part(param: str, begin: int, end: int) -> StatePart:
        return StatePart(*(read(kind, param, begin, end) for kind in STATE_KINDS))

    for name, record in manifest.params.items():
        slot = runtime.layout.slot_by_name[name]
        if record.is_trainable:
            write_state(runtime, slot, partial(read_part, name))
        elif slot.spec.numel:
            load_master(runtime, slot, read(WEIGHT_KIND, name, 0, slot.spec.numel).view(slot.spec.shape))
