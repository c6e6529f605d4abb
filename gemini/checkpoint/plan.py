"""The plan of a save, made before anything is written: plain data and pure functions.

Every rank's file of parameters has an entry for each kind of each parameter. It is empty where other ranks save all
elements, so that all ranks' files list the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from gemini.checkpoint.manifest import (
    FileRecord,
    Manifest,
    ParamRecord,
    Piece,
    entry_name,
    run_state_name,
    weights_name,
)
from gemini.checkpoint.participants import division_of
from gemini.chunk.cut import piece_of
from gemini.chunk.layout import ChunkSpec, ParamPlace
from gemini.files.safetensors import SafetensorsLayout, TensorEntry, lay_out_tensors
from gemini.ranks.sharding import ChunkShard, RankGrid
from gemini.weights.values import FROZEN_KINDS, STATE_KINDS

__all__ = ["PlannedRun", "SavePlan", "SavedChunk", "manifest_of", "plan_save", "summary_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedChunk:
    """The parts of a chunk that a save needs."""

    spec: ChunkSpec
    shard: ChunkShard | None
    """Shard of the chunk that this rank holds; None if it holds the whole chunk."""
    is_on_device: bool
    """Whether a part of its weights or state lives on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """Consecutive elements of a rank's part of a parameter, in row-major order, which this rank saves."""

    param: str
    """Name of the parameter."""
    record: ParamRecord
    """Entry of the parameter in the manifest."""
    part: int
    """Number of the part, from 0."""
    begin: int
    """First element of the part."""
    end: int
    """One past the last; `begin` if this rank saves none."""
    is_on_device: bool
    """Whether it is read from a device, at least in part."""

    @property
    def entry_names(self) -> tuple[str, ...]:
        """Names in the file of parameters of what is kept of the run, by kind."""
        return tuple(entry_name(kind, self.param) for kind in self.record.kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """The part of a checkpoint that one rank writes."""

    step: int
    """Optimizer steps taken."""
    rank: int
    """Place of this rank among those that share the model, from 0."""
    runs: tuple[PlannedRun, ...]
    """Runs of all parameters that are saved, one of each, in the order of the layout: the same one on all ranks."""
    weights: SafetensorsLayout
    """Layout of the file of parameters."""

    @property
    def weights_name(self) -> str:
        """Name of the file of parameters."""
        return weights_name(self.rank)

    @property
    def run_state_name(self) -> str:
        """Name of the file of everything else."""
        return run_state_name(self.rank)

    @property
    def runs_at_once(self) -> Iterator[PlannedRun]:
        """Runs that are written first, by the thread that owns the device, in this order."""
        return (run for run in self.runs if run.begin < run.end and run.is_on_device)

    @property
    def runs_behind(self) -> Iterator[PlannedRun]:
        """Runs that are written while training continues, in this order."""
        return (run for run in self.runs if run.begin < run.end and not run.is_on_device)

    def entry_of(self, run: PlannedRun, kind: str) -> TensorEntry:
        """Return where one kind of a run lies in the file of parameters."""
        return self.weights.entries[entry_name(kind, run.param)]


def plan_save(
    chunks: Iterable[SavedChunk], *, step: int, rank: int, grid: RankGrid, with_frozen: bool = True
) -> SavePlan:
    """Decide which elements a rank saves, and where in its file they go.

    Args:
        chunks: all chunks of the layout, in their order.
        step: optimizer steps taken.
        rank: place of this rank among those that share the model, from 0: shards of a replica are neighbours.
        grid: how these are arranged.
        with_frozen: whether frozen parameters are saved too.

    Returns:
        The plan. Together the plans of all ranks have each element of each parameter once.

    Raises:
        CheckpointError: a parameter has a name, or a frozen one a dtype, that the file cannot hold.
    """
    runs: list[PlannedRun] = []
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for chunk in chunks:
        if not (with_frozen or chunk.spec.is_trainable):
            continue
        kinds = STATE_KINDS if chunk.spec.is_trainable else FROZEN_KINDS
        dtype = torch.float32 if chunk.spec.is_trainable else chunk.spec.dtype
        for place in chunk.spec.places:
            elements = _run_of(place, chunk.shard, rank=rank, grid=grid)
            run = PlannedRun(
                param=place.spec.name,
                record=ParamRecord(place.spec.full_shape, kinds, division_of(place)),
                part=0 if place.spec.split is None else place.spec.split.rank,
                begin=elements.start,
                end=elements.stop,
                is_on_device=chunk.is_on_device,
            )
            runs.append(run)
            tensors.update((name, (dtype, (run.end - run.begin,))) for name in run.entry_names)
    return SavePlan(step=step, rank=rank, runs=tuple(runs), weights=lay_out_tensors(tensors))


def _run_of(place: ParamPlace, shard: ChunkShard | None, *, rank: int, grid: RankGrid) -> slice:
    """Return which elements of its part of a parameter a rank saves: none that an earlier rank holds too."""
    has_copy_elsewhere = (
        grid.replica > 0
        or (grid.tensor_rank > 0 and place.spec.split is None)
        or (shard is None and rank % grid.num_shards > 0)
    )
    if has_copy_elsewhere:
        return slice(0, 0)
    return slice(0, place.spec.numel) if shard is None else piece_of(place, shard)


def summary_of(plan: SavePlan, checksums: Mapping[str, int], run_state: FileRecord) -> list[int]:
    """Return the summary of a rank's written files that the first rank needs.

    Args:
        plan: what the files hold.
        checksums: CRC-32 of each entry of the file of parameters.
        run_state: the other file.

    Returns:
        As many numbers on all ranks.
    """
    assert run_state.checksum is not None
    summary = [plan.weights.nbytes, run_state.nbytes, run_state.checksum]
    for run in plan.runs:
        summary += [run.part, run.begin, run.end, *(checksums[name] for name in run.entry_names)]
    return summary


def manifest_of(plan: SavePlan, summaries: Sequence[Sequence[int]]) -> Manifest:
    """Describe a checkpoint.

    Args:
        plan: any rank's.
        summaries: those of all ranks, in order.

    Returns:
        The manifest.
    """
    files: dict[str, FileRecord] = {}
    for rank, summary in enumerate(summaries):
        numbers = iter(summary)
        weights_nbytes, state_nbytes, state_checksum = islice(numbers, 3)
        pieces = {}
        for run in plan.runs:
            part, begin, end = islice(numbers, 3)
            kinds = run.record.kinds
            checksums = dict(zip(kinds, islice(numbers, len(kinds)), strict=True))
            if begin < end or not run.record.numel:
                pieces[run.param] = Piece(part, begin, end, checksums)
        files[weights_name(rank)] = FileRecord(weights_nbytes, None, pieces)
        files[run_state_name(rank)] = FileRecord(state_nbytes, state_checksum, {})
    params = {run.param: run.record for run in plan.runs}
    return Manifest(plan.step, len(summaries), params, files)
