"""The optimizer's pass, tile by tile through all tiers, against one kernel call on the whole chunk."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from builders import make_chunk_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_resources import break_writes, small_resources, truncated_file
from torch import Tensor

from gemini.chunk.core import ChunkCore
from gemini.errors import OffloadIOError, WorkerError
from gemini.kernels.adam_tile import AdamHyper, AdamSegment, AdamTile, clip_segments, state_format_of
from gemini.kernels.cpu import adam_update
from gemini.kernels.device import select_device_kernels
from gemini.kernels.pool import Ticket
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.offload.slots import FixedSlots
from gemini.offload.transfer import CpuTransfers
from gemini.profile.listeners import RunListeners
from gemini.ranks.one_rank import ALONE
from gemini.tiers import MemoryTier, round_up
from gemini.update.job import UpdateJob
from gemini.update.pipeline import TilePipeline, tiles_of, update_on_device
from gemini.update.state_record import record_views
from gemini.update.worker import UpdateWorker

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
TILE_NUMEL = 4096
NUMEL = 4 * TILE_NUMEL + 1088
NUM_TILES = 5
HYPER = AdamHyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
CLASSIC = AdamHyper(lr=3e-3, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2, is_decoupled=False)
EVERYTHING = (AdamSegment(begin=0, end=NUMEL, hyper=HYPER, step=3),)
# Parameters of two groups, one of them over three tiles; what lies between is left alone.
PARTS = (
    AdamSegment(begin=0, end=100, hyper=HYPER, step=3),
    AdamSegment(begin=4000, end=12_345, hyper=CLASSIC, step=7),
    AdamSegment(begin=12_352, end=12_353, hyper=HYPER, step=1),
    AdamSegment(begin=NUMEL - 1000, end=NUMEL, hyper=HYPER, step=3),
)


def lengths() -> list[int]:
    return [min(TILE_NUMEL, NUMEL - i * TILE_NUMEL) for i in range(NUM_TILES)]


class Whole:
    """A chunk's weights, state and gradient in one piece, updated by one kernel call."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.working = torch.randn(NUMEL, generator=generator).to(dtype)
        master_dtype = state_format_of(dtype).master_dtype
        self.master: Tensor | None = None
        if master_dtype is torch.int16:
            self.master = torch.randint(-30_000, 30_000, (NUMEL,), dtype=torch.int16, generator=generator)
        elif master_dtype is not None:
            self.master = self.working.to(master_dtype)
        self.momentum = torch.randn(NUMEL, generator=generator)
        self.variance = torch.rand(NUMEL, generator=generator)
        self.grad = torch.randn(NUMEL, generator=generator)

    def updated(self, segments: Sequence[AdamSegment], grad_scale: float) -> Whole:
        other = copy.deepcopy(self)
        adam_update(
            AdamTile(
                working=other.working,
                master=other.master,
                momentum=other.momentum,
                variance=other.variance,
                grad=other.grad,
                grad_scale=grad_scale,
                segments=tuple(segments),
            )
        )
        return other

    def parts(self) -> list[Tensor]:
        return [part for part in (self.working, self.master, self.momentum, self.variance) if part is not None]


def same_bits(found: Whole, expected: Whole) -> bool:
    pairs = zip(found.parts(), expected.parts(), strict=True)
    return all(torch.equal(f.view(torch.uint8), e.view(torch.uint8)) for f, e in pairs)


class Placed:
    """The same chunk in homes of given tiers."""

    def __init__(
        self,
        resources: Resources,
        core: ChunkCore,
        whole: Whole,
        tiers: dict[str, Sequence[MemoryTier]],
        *,
        spares: Sequence[int] = (),
    ) -> None:
        self.resources, self.dtype, self.tiers = resources, whole.working.dtype, tiers
        master_dtype = state_format_of(self.dtype).master_dtype
        master_itemsize = 0 if master_dtype is None else master_dtype.itemsize
        sizes = {
            "working": [round_up(n * self.dtype.itemsize, 4096) for n in lengths()],
            "state": [round_up(n * master_itemsize, 4096) + 2 * round_up(n * 4, 4096) for n in lengths()],
            "grad": [round_up(n * 4, 4096) for n in lengths()],
        }
        self.homes = {kind: self._home(tiers[kind], sizes[kind], () if kind == "grad" else spares) for kind in sizes}
        for tile, length in enumerate(lengths()):
            here = slice(tile * TILE_NUMEL, tile * TILE_NUMEL + length)
            for kind, contents in (("working", [whole.working]), ("grad", [whole.grad])):
                with self.tile(kind, tile, write=True) as content:
                    content[: length * contents[0].element_size()] = contents[0][here].view(torch.uint8)
            with self.tile("state", tile, write=True) as content:
                views = record_views(content, length, self.dtype)
                for view, source in zip(views, (whole.master, whole.momentum, whole.variance), strict=True):
                    if view is not None and source is not None:
                        view.copy_(source[here])
        spec = make_chunk_spec([NUMEL], self.dtype, chunk_id=len(core.chunks), is_padded=False)
        self.chunk = core.add(spec, [torch.empty(0, dtype=self.dtype)], self.homes["working"], is_resident=False)

    def _home(self, tiers: Sequence[MemoryTier], nbytes: list[int], spares: Sequence[int]) -> TiledHome:
        return TiledHome(
            tiers,
            nbytes,
            arena=self.resources.arena,
            store=self.resources.store,
            transfers=self.resources.transfers,
            spare_tiles=spares,
            purpose="state",
        )

    def tile(self, kind: str, tile: int, *, write: bool = False) -> AbstractContextManager[Tensor]:
        return self.homes[kind].opened(tile, self.resources.transfers, write=write)

    def job(self, segments: tuple[AdamSegment, ...], grad_scale: float = 0.5) -> UpdateJob:
        return UpdateJob(
            spec=self.chunk.spec,
            working=self.homes["working"],
            state=self.homes["state"],
            grad=self.homes["grad"],
            grad_dtype=torch.float32,
            segments=segments,
            grad_scale=grad_scale,
            tiles=tiles_of(segments, TILE_NUMEL),
        )

    def whole(self) -> Whole:
        """Read everything back in one piece."""
        found = Whole(self.dtype, seed=99)
        for tile, length in enumerate(lengths()):
            here = slice(tile * TILE_NUMEL, tile * TILE_NUMEL + length)
            with self.tile("working", tile) as content:
                found.working[here] = content[: length * self.dtype.itemsize].view(self.dtype)
            with self.tile("state", tile) as content:
                master, found.momentum[here], found.variance[here] = record_views(content, length, self.dtype)
                if master is not None and found.master is not None:
                    found.master[here] = master
        return found


def all_in(tier: MemoryTier) -> dict[str, Sequence[MemoryTier]]:
    return dict.fromkeys(("working", "state", "grad"), (tier,) * NUM_TILES)


def make_worker(resources: Resources, ring_depth: int = 3) -> tuple[ChunkCore, UpdateWorker]:
    core = ChunkCore(
        resources,
        slots=FixedSlots(resources.transfers, num_slots=1, slot_nbytes=1 << 20, purpose="slots"),
        staging=FixedSlots(CpuTransfers(resources.arena), num_slots=1, slot_nbytes=1 << 20, purpose="fetch slots"),
        group=ALONE.group,
        next_use=lambda chunk_id: 0,
        listeners=RunListeners(),
    )
    pipeline = TilePipeline(
        resources,
        tile_numel=TILE_NUMEL,
        ring_depth=ring_depth,
        ring_nbytes=5 * 4 * TILE_NUMEL,  # master, two moments, weights and gradient
    )
    return core, UpdateWorker(pipeline, RunListeners())


def run(worker: UpdateWorker, jobs: Sequence[UpdateJob]) -> None:
    for distance, job in enumerate(jobs):
        worker.submit(job, distance=distance)
    for job in jobs:
        worker.wait(job)


@pytest.fixture(params=["cpu", "simulated"])
def resources(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Resources]:
    with small_resources(tmp_path, device=request.param) as made:
        yield made


MIXED = st.lists(st.sampled_from([HOST, NVME]), min_size=NUM_TILES, max_size=NUM_TILES)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    working=MIXED,
    state=MIXED,
    grad=st.sampled_from([HOST, NVME]),
    ring_depth=st.integers(2, 5),
    segments=st.sampled_from([EVERYTHING, PARTS]),
)
def test_any_mixture_of_tiers_and_any_ring_give_the_bits_of_one_call(
    resources: Resources,
    dtype: torch.dtype,
    working: list[MemoryTier],
    state: list[MemoryTier],
    grad: MemoryTier,
    ring_depth: int,
    segments: tuple[AdamSegment, ...],
) -> None:
    core, worker = make_worker(resources, ring_depth)
    whole = Whole(dtype)
    placed = Placed(resources, core, whole, {"working": working, "state": state, "grad": (grad,) * NUM_TILES})
    for _ in range(2):
        run(worker, [placed.job(segments)])
        whole = whole.updated(segments, 0.5)
        assert same_bits(placed.whole(), whole)
    worker.close()
    core.close()
    for kind in ("state", "grad"):
        placed.homes[kind].close()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    working=MIXED,
    state=MIXED,
    grad=st.sampled_from([HOST, NVME]),
    segments=st.sampled_from([EVERYTHING, PARTS]),
    spares=st.sets(st.integers(0, NUM_TILES - 1)),
)
def test_an_update_ahead_changes_nothing_before_it_counts(
    resources: Resources,
    dtype: torch.dtype,
    working: list[MemoryTier],
    state: list[MemoryTier],
    grad: MemoryTier,
    segments: tuple[AdamSegment, ...],
    spares: set[int],
) -> None:
    core, worker = make_worker(resources)
    before = Whole(dtype)
    tiers = {"working": working, "state": state, "grad": (grad,) * NUM_TILES}
    placed = Placed(resources, core, before, tiers, spares=sorted(spares))
    job = placed.job(segments)
    ahead = tuple(tile for tile in job.tiles if tile in spares)
    for _ in range(2):  # dropped once, then taken
        if ahead:
            job = dataclasses.replace(placed.job(segments), tiles=ahead, is_ahead=True)
            worker.submit(job, distance=0)
            worker.wait(job)
            assert same_bits(placed.whole(), before)
            worker.cancel(job)
    rest = dataclasses.replace(placed.job(segments), tiles=tuple(set(placed.job(segments).tiles) - set(ahead)))
    if ahead:
        worker.submit(job, distance=0)
        worker.wait(job)
        for home in (job.state, job.working):
            home.flip(ahead)
    if rest.tiles:
        run(worker, [rest])
        for home in (rest.state, rest.working):
            home.flip([tile for tile in rest.tiles if rest.goes_ahead(tile)])
    assert same_bits(placed.whole(), before.updated(segments, 0.5))
    worker.close()
    core.close()
    for kind in ("state", "grad"):
        placed.homes[kind].close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_device_s_kernel_gives_the_same_bits(dtype: torch.dtype) -> None:
    with small_resources(device="simulated") as resources:
        core, _ = make_worker(resources)
        placed = Placed(resources, core, Whole(dtype), all_in(DEVICE))
        update_on_device(placed.job(PARTS), TILE_NUMEL, select_device_kernels(resources.transfers.device))
        assert same_bits(placed.whole(), Whole(dtype).updated(PARTS, 0.5))


@pytest.mark.parametrize("tier", [HOST, NVME])
def test_what_no_segment_covers_keeps_every_bit(resources: Resources, tier: MemoryTier) -> None:
    core, worker = make_worker(resources)
    before = Whole(torch.bfloat16)
    placed = Placed(resources, core, before, all_in(tier))
    run(worker, [placed.job(PARTS)])
    covered = torch.zeros(NUMEL, dtype=torch.bool)
    for segment in PARTS:
        covered[segment.begin : segment.end] = True
    for found, old in zip(placed.whole().parts(), before.parts(), strict=True):
        assert torch.equal(found[~covered].view(torch.uint8), old[~covered].view(torch.uint8))
        assert (found[covered] != old[covered]).any()


@pytest.mark.parametrize("ring_depth", [2, 3, 4, 5])
def test_many_chunks_share_a_ring(resources: Resources, ring_depth: int) -> None:
    core, worker = make_worker(resources, ring_depth)
    wholes = [Whole(torch.float32, seed) for seed in range(4)]
    placed = [
        Placed(resources, core, whole, all_in(tier)) for whole, tier in zip(wholes, (NVME, HOST) * 2, strict=True)
    ]
    for _ in range(3):
        run(worker, [p.job(EVERYTHING) for p in placed])
        wholes = [whole.updated(EVERYTHING, 0.5) for whole in wholes]
    assert all(same_bits(p.whole(), whole) for p, whole in zip(placed, wholes, strict=True))


@pytest.mark.parametrize("tier", [HOST, NVME])
def test_a_resident_copy_is_brought_up_to_date(resources: Resources, tier: MemoryTier) -> None:
    core, worker = make_worker(resources)
    placed = Placed(resources, core, Whole(torch.float32), all_in(tier))
    placed.chunk.is_resident = True
    core.residents.bring_in(0)
    core.begin_update(0)
    job = placed.job(PARTS)
    if placed.chunk.slot is not None:  # else the home itself is compute memory
        job.refreshes = placed.chunk.slot.buffer[: NUMEL * 4].view(torch.float32)
    run(worker, [job])
    for refresh in job.refreshing:
        refresh.wait() if isinstance(refresh, Ticket) else refresh.wait_on_compute()
    core.end_update(0)
    assert torch.equal(placed.chunk.params[0], Whole(torch.float32).updated(PARTS, 0.5).working)


def fail_reads(resources: Resources, run: Callable[[], None]) -> None:
    assert resources.store is not None
    with truncated_file(resources.store.path, 100_000), pytest.raises(OffloadIOError, match="the file ends before"):
        run()


def fail_writes(resources: Resources, run: Callable[[], None]) -> None:
    break_writes(resources)
    with pytest.raises(OffloadIOError, match="No space left on device"):
        run()


@pytest.mark.parametrize("fail", [fail_reads, fail_writes])
@pytest.mark.parametrize("ring_depth", [2, 5])
def test_an_error_in_the_middle_returns_every_buffer(
    resources: Resources, fail: Callable[[Resources, Callable[[], None]], None], ring_depth: int
) -> None:
    core, worker = make_worker(resources, ring_depth)
    # Only the state is on disk, so that with broken descriptors reads of /dev/full give zeros and writes fail.
    tiers = {**all_in(HOST), "state": (NVME,) * NUM_TILES}
    placed = [Placed(resources, core, Whole(torch.float32, seed), tiers) for seed in (0, 1)]

    def update() -> None:
        run(worker, [p.job(EVERYTHING) for p in placed])
        for p in placed:
            p.homes["state"].finish_writes()

    fail(resources, update)
    worker.close()
    assert "update ring" not in resources.ledger.by_purpose(HOST)
    core.close()
    for p in placed:
        for kind in ("state", "grad"):
            p.homes[kind].close()
    assert resources.store is not None
    assert resources.store.held_nbytes == 0


def test_nobody_waits_for_a_thread_that_has_ended(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemini.update.worker._serve", lambda shared: None)
    core, worker = make_worker(resources)
    job = Placed(resources, core, Whole(torch.float32), all_in(HOST)).job(EVERYTHING)
    worker.submit(job, distance=0)
    with pytest.raises(WorkerError, match="has ended before its work was done"):
        worker.wait(job)


# ---------------------------------------------------------------------- pure helpers


def test_segments_are_cut_to_a_tile() -> None:
    found = clip_segments(PARTS, 4096, 8192)
    assert found == (AdamSegment(begin=0, end=4096, hyper=CLASSIC, step=7),)
    assert [(s.begin, s.end) for s in clip_segments(PARTS, 0, 4096)] == [(0, 100), (4000, 4096)]
    assert clip_segments(PARTS, 100, 4000) == ()
