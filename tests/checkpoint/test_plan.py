"""A save is planned without a disk: every element once, in files without gaps; and files are what was planned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import Scenario, training

from gemini.checkpoint.directory import read_manifest
from gemini.checkpoint.manifest import FileRecord, find_pieces
from gemini.checkpoint.plan import SavedChunk, SavePlan, manifest_of, plan_save, summary_of
from gemini.chunk.layout import ChunkSpec, ParamPlace
from gemini.files.safetensors import SafetensorsReader
from gemini.model.params import ParamSpec
from gemini.model.tensor_parallel import TensorSplit
from gemini.ranks.sharding import ChunkShard, RankGrid

DTYPES = (torch.float32, torch.bfloat16)
STATE = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Param:
    """A parameter before it is divided."""

    shape: tuple[int, int]
    split_dim: int | None = None
    """Dimension that tensor parallelism divides; extents there are multiples of the number of tensor ranks."""


@dataclass(frozen=True)
class Chunk:
    """Parameters that share a chunk."""

    params: tuple[Param, ...]
    dtype: torch.dtype = torch.float32
    is_trainable: bool = True
    is_whole: bool = False
    """Whether every rank of a replica holds all of it."""
    is_on_device: bool = False


@dataclass(frozen=True)
class Job:
    """A layout, and ranks that share it."""

    chunks: tuple[Chunk, ...]
    num_shards: int = 1
    num_replicas: int = 1
    num_tensor_ranks: int = 1

    @property
    def num_ranks(self) -> int:
        return self.num_shards * self.num_replicas * self.num_tensor_ranks

    @property
    def params(self) -> dict[str, tuple[Chunk, Param]]:
        return {
            f"chunk{i}.weight{j}": (chunk, param)
            for i, chunk in enumerate(self.chunks)
            for j, param in enumerate(chunk.params)
        }

    def plan(self, rank: int, *, with_frozen: bool = True) -> SavePlan:
        rest, shard = divmod(rank, self.num_shards)
        tensor_rank, replica = divmod(rest, self.num_replicas)
        grid = RankGrid(
            num_shards=self.num_shards,
            num_replicas=self.num_replicas,
            replica=replica,
            num_tensor_ranks=self.num_tensor_ranks,
            tensor_rank=tensor_rank,
        )
        chunks = [self._saved(i, chunk, shard, tensor_rank) for i, chunk in enumerate(self.chunks)]
        return plan_save(chunks, step=3, rank=rank, grid=grid, with_frozen=with_frozen)

    def plans(self) -> list[SavePlan]:
        return [self.plan(rank) for rank in range(self.num_ranks)]

    def _saved(self, chunk_id: int, chunk: Chunk, shard: int, tensor_rank: int) -> SavedChunk:
        places: list[ParamPlace] = []
        numel = 0
        for j, param in enumerate(chunk.params):
            shape, split = list(param.shape), None
            if param.split_dim is not None and self.num_tensor_ranks > 1:
                shape[param.split_dim] //= self.num_tensor_ranks
                split = TensorSplit(dim=param.split_dim, rank=tensor_rank, num_ranks=self.num_tensor_ranks)
            spec = ParamSpec(
                name=f"chunk{chunk_id}.weight{j}",
                index=j,
                shape=tuple(shape),
                dtype=chunk.dtype,
                is_trainable=chunk.is_trainable,
                split=split,
            )
            places.append(ParamPlace(spec=spec, chunk_id=chunk_id, begin=numel))
            numel += spec.numel + 3  # padding
        layout = ChunkSpec(
            chunk_id=chunk_id,
            unit_id=0,
            dtype=chunk.dtype,
            is_trainable=chunk.is_trainable,
            places=tuple(places),
            numel=max(numel, 1),
        )
        is_cut = self.num_shards > 1 and not chunk.is_whole
        part = ChunkShard(rank=shard, num_ranks=self.num_shards, numel=-(-layout.numel // self.num_shards))
        return SavedChunk(spec=layout, shard=part if is_cut else None, is_on_device=chunk.is_on_device)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    num_tensor_ranks = draw(st.integers(1, 3))
    extents = st.integers(0, 3).map(lambda count: count * num_tensor_ranks)
    params = st.builds(Param, st.tuples(extents, extents), st.sampled_from([None, 0, 1]))
    chunks = st.builds(
        Chunk,
        st.lists(params, max_size=4).map(tuple),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    )
    found = draw(st.lists(chunks, max_size=4))
    return Job(tuple(found), draw(st.integers(1, 4)), draw(st.integers(1, 2)), num_tensor_ranks)


def elements_of(job: Job, plans: Sequence[SavePlan], name: str) -> Counter[int]:
    """Count in how many ranks' runs each element of a parameter is, by its place in the whole parameter."""
    param = job.params[name][1]
    whole = torch.arange(param.shape[0] * param.shape[1]).view(param.shape)
    found: Counter[int] = Counter()
    for plan in plans:
        (run,) = [run for run in plan.runs if run.param == name]
        part = whole
        if param.split_dim is not None:
            part = whole.chunk(job.num_tensor_ranks, param.split_dim)[run.part] if whole.numel() else whole
        found.update(part.reshape(-1)[run.begin : run.end].tolist())
    return found


@given(job=jobs())
def test_ranks_together_save_each_element_once(job: Job) -> None:
    plans = job.plans()
    for name, (_, param) in job.params.items():
        expected = dict.fromkeys(range(param.shape[0] * param.shape[1]), 1)
        assert elements_of(job, plans, name) == expected


@given(job=jobs())
def test_a_file_has_an_entry_for_each_kind_of_each_run_without_gaps(job: Job) -> None:
    for plan in job.plans():
        entries = []
        for run in plan.runs:
            chunk = job.params[run.param][0]
            assert run.record.kinds == (STATE if chunk.is_trainable else ("weight",))
            for kind in run.record.kinds:
                entry = plan.entry_of(run, kind)
                assert entry.dtype is (torch.float32 if chunk.is_trainable else chunk.dtype)
                assert entry.shape == (run.end - run.begin,)
                assert entry.begin % entry.dtype.itemsize == 0
                entries.append((entry.begin, entry.nbytes))
        assert len(entries) == len(plan.weights.entries)
        end = len(plan.weights.header)
        for begin, nbytes in sorted(entries):
            assert begin == end
            end += nbytes
        assert end == plan.weights.nbytes


@given(job=jobs())
def test_the_header_says_what_the_plan_says(job: Job) -> None:
    plan = job.plan(0)
    header = json.loads(plan.weights.header[8:])
    base = 8 + int.from_bytes(plan.weights.header[:8], "little")
    assert base == len(plan.weights.header)
    found = {name: [base + offset for offset in fields["data_offsets"]] for name, fields in header.items()}
    assert found == {name: [entry.begin, entry.begin + entry.nbytes] for name, entry in plan.weights.entries.items()}


@given(job=jobs())
def test_runs_on_the_device_come_first_and_each_that_is_not_empty_once(job: Job) -> None:
    for plan in job.plans():
        at_once, behind = list(plan.runs_at_once), list(plan.runs_behind)
        assert all(job.params[run.param][0].is_on_device for run in at_once)
        assert not any(job.params[run.param][0].is_on_device for run in behind)
        written = {run.param for run in (*at_once, *behind)}
        assert len(written) == len(at_once) + len(behind)
        assert written == {run.param for run in plan.runs if run.begin < run.end}
        for runs in (at_once, behind):
            assert runs == [run for run in plan.runs if run in runs]


@given(job=jobs())
def test_the_manifest_finds_each_element_in_one_file(job: Job) -> None:
    plans = job.plans()
    summaries = [summary_of(plan, checksums_of(plan), FileRecord(100 + plan.rank, 7 + plan.rank, {})) for plan in plans]
    assert len(set(map(len, summaries))) == 1
    manifest = manifest_of(plans[-1], summaries)
    assert (manifest.step, manifest.world_size) == (3, job.num_ranks)
    assert list(manifest.params) == list(job.params)
    for plan in plans:
        assert manifest.files[plan.weights_name].nbytes == plan.weights.nbytes
        assert manifest.files[plan.run_state_name] == FileRecord(100 + plan.rank, 7 + plan.rank, {})
        saved = {run.param for run in plan.runs if run.begin < run.end or not run.record.numel}
        assert manifest.files[plan.weights_name].pieces.keys() == saved
    for name, record in manifest.params.items():
        for part in range(record.division.num_parts):
            pieces = find_pieces(manifest, name, part, 0, record.part_numel)
            assert sum(piece.end - piece.begin for _, piece in pieces) == record.part_numel
            for file, piece in pieces:
                (plan,) = [plan for plan in plans if plan.weights_name == file]
                checksums = checksums_of(plan)
                assert piece.checksums == {kind: checksums[f"{kind}.{name}"] for kind in record.kinds}


def checksums_of(plan: SavePlan) -> dict[str, int]:
    """Return made-up checksums, another one for each entry of each rank."""
    return {name: 1000 * plan.rank + number for number, name in enumerate(plan.weights.entries)}


def test_two_shards_of_a_chunk_save_a_run_each() -> None:
    job = Job((Chunk((Param((4, 5)), Param((2, 3)))),), num_shards=2)
    runs = [[(run.begin, run.end) for run in job.plan(rank).runs] for rank in range(2)]
    assert runs == [[(0, 16), (0, 0)], [(16, 20), (0, 6)]]
    first = job.plan(0)
    assert first.weights_name == "rank-00000.safetensors"
    assert first.weights.nbytes - len(first.weights.header) == 3 * 16 * 4


@pytest.mark.parametrize(("num_replicas", "num_tensor_ranks"), [(2, 1), (1, 2)])
def test_of_what_ranks_have_in_common_the_first_one_saves_all(num_replicas: int, num_tensor_ranks: int) -> None:
    job = Job((Chunk((Param((4, 5)),)),), num_replicas=num_replicas, num_tensor_ranks=num_tensor_ranks)
    assert [[(run.begin, run.end) for run in plan.runs] for plan in job.plans()] == [[(0, 20)], [(0, 0)]]


def test_frozen_parameters_are_left_out_if_they_are_not_wanted() -> None:
    job = Job((Chunk((Param((4, 5)),), is_trainable=False), Chunk((Param((2, 3)),))))
    assert [run.param for run in job.plan(0, with_frozen=False).runs] == ["chunk1.weight0"]
    assert [run.param for run in job.plan(0).runs] == ["chunk0.weight0", "chunk1.weight0"]


@pytest.mark.parametrize("place", ["host", "resident"])
def test_what_is_written_is_what_was_planned(place: str, tmp_path: Path) -> None:
    with training(Scenario(trainable="attn"), place, tmp_path) as run:
        saved = run.engine.save_checkpoint(tmp_path / "run")
        path = saved.wait()
        chunks = [
            SavedChunk(spec=chunk.spec, shard=None, is_on_device=False) for chunk in run.engine.runtime.core.chunks
        ]
    plan = plan_save(chunks, step=0, rank=0, grid=RankGrid(num_shards=1))
    with SafetensorsReader(path / plan.weights_name) as file:
        assert file.entries == plan.weights.entries
    assert (path / plan.weights_name).stat().st_size == plan.weights.nbytes
    assert (path / plan.weights_name).read_bytes().startswith(plan.weights.header)
    assert list(read_manifest(path).params) == [planned.param for planned in plan.runs]
