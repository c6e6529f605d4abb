"""Chunks and their slots: holds, eviction, prefetch, and failures that can be tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import make_chunk_spec
from small_resources import break_writes, small_resources, truncated_file

from gemini.chunk.core import ChunkCore
from gemini.chunk.state import ChunkState
from gemini.errors import IllegalTransitionError, OffloadIOError, OutOfTierMemoryError
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.offload.slots import FixedSlots
from gemini.offload.transfer import CpuTransfers
from gemini.profile.listeners import RunListeners
from gemini.ranks.one_rank import ALONE
from gemini.tiers import MemoryTier

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
NUMEL = 3000  # of 4 bytes: three pages
NUM_SLOTS = 2


def make_core(
    resources: Resources,
    tiers: list[MemoryTier],
    *,
    num_staging: int = 1,
    next_use: Callable[[int], int] = lambda chunk_id: 0,
    num_protected: int = 1,
) -> ChunkCore:
    """Return a core whose chunk i has one tensor, full of i, at home in tiers[i]."""
    core = ChunkCore(
        resources,
        slots=FixedSlots(resources.transfers, num_slots=NUM_SLOTS, slot_nbytes=12_288, purpose="slots"),
        staging=FixedSlots(
            CpuTransfers(resources.arena), num_slots=num_staging, slot_nbytes=12_288, purpose="fetch slots"
        ),
        group=ALONE.group,
        next_use=next_use,
        listeners=RunListeners(),
        num_protected=num_protected,
    )
    for i, tier in enumerate(tiers):
        spec = make_chunk_spec([NUMEL], chunk_id=i, name=f"weight{i}", is_trainable=False, is_padded=False)
        home = TiledHome([tier], [12_288], arena=resources.arena, store=resources.store, purpose="working")
        content = torch.full((3072,), float(i)).view(torch.uint8)
        if tier is NVME:
            home.write_tile(0, content)
        else:
            home.tile(0).copy_(content)
        core.add(spec, [torch.empty(0)], home, is_resident=False)
    return core


@pytest.fixture(params=["cpu", "simulated"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., ChunkCore]]:
    with small_resources(tmp_path, device=request.param) as resources:
        yield lambda tiers, **options: make_core(resources, tiers, **options)


def values(core: ChunkCore, chunk_id: int) -> torch.Tensor:
    return core.chunks[chunk_id].params[0]


def shows(core: ChunkCore, chunk_id: int) -> bool:
    """Return whether a chunk's tensor shows its values; a placeholder is NaN."""
    return bool(torch.equal(values(core, chunk_id), torch.full((NUMEL,), float(chunk_id))))


def states(core: ChunkCore) -> list[ChunkState]:
    return [chunk.state for chunk in core.chunks]


AT_HOME, FETCHING, READY = ChunkState.AT_HOME, ChunkState.FETCHING, ChunkState.READY
HELD, UPDATING = ChunkState.HELD, ChunkState.UPDATING


def test_access_shows_the_weights_and_release_keeps_them(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST])
    assert values(core, 0).isnan().all()
    for chunk_id in (0, 1):
        core.access(chunk_id)
        assert shows(core, chunk_id)
        core.release(chunk_id)
    assert states(core) == [READY, READY]
    assert shows(core, 0)
    assert (core.stats.num_fetches, core.stats.num_misses, core.stats.fetched_nbytes) == (2, 2, 24_576)
    assert core.stats.read_nbytes == 12_288


def test_leases_nest(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME])
    core.access(0)
    core.access(0)
    assert core.release(0) is False
    assert states(core) == [HELD]
    assert core.release(0) is True
    assert states(core) == [READY]
    assert core.stats.num_fetches == 1
    with pytest.raises(AssertionError, match=r"chunk 0 \(weight0 and 0 more\): it is not held"):
        core.release(0)


def test_a_leased_chunk_is_never_evicted(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST, NVME])
    core.access(0)
    core.access(1)
    message = (
        r"^cannot fetch chunk 2 \(weight2 and 0 more\), 11.72 KiB, to (host|device) memory: all 2 slots are in use"
    )
    with pytest.raises(OutOfTierMemoryError, match=message):
        core.access(2)
    assert states(core) == [HELD, HELD, AT_HOME]
    with pytest.raises(IllegalTransitionError, match="chunk 0 .* is 'held' and cannot become 'at home'"):
        core.evict(0)
    assert shows(core, 0)
    core.release(0)
    assert core.access(2).state is HELD
    assert shows(core, 2)


def test_the_chunk_used_last_in_the_future_leaves(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST, NVME, HOST], next_use={0: 9, 1: 3, 2: 1, 3: 5}.__getitem__, num_protected=0)
    for chunk_id in (0, 1):
        core.access(chunk_id)
        core.release(chunk_id)
    core.access(2)
    assert states(core) == [AT_HOME, READY, HELD, AT_HOME]
    assert values(core, 0).isnan().all()


def test_the_most_recently_used_chunk_is_protected(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST, NVME], next_use={0: 1, 1: 9, 2: 2}.__getitem__)
    for chunk_id in (0, 1):
        core.ensure(chunk_id)
    assert core.slots.evictable() == {0}
    core.ensure(2)
    assert states(core) == [AT_HOME, READY, READY]


def test_a_prefetch_is_no_miss(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST])
    core.prefetch(0)
    core.prefetch(0)
    assert states(core) == [FETCHING, AT_HOME]
    assert core.slots.chunk_ids() == {0}
    assert values(core, 0).isnan().all()
    core.access(0)
    assert shows(core, 0)
    assert (core.stats.num_fetches, core.stats.num_misses) == (1, 0)
    core.prefetch(0)
    assert states(core) == [HELD, AT_HOME]


def test_a_chunk_on_its_way_leaves_only_if_nothing_else_can(make: Callable[..., ChunkCore]) -> None:
    core = make([HOST, HOST, HOST, HOST], num_protected=0)
    core.prefetch(0)
    core.ensure(1)
    core.prefetch(2)
    assert states(core) == [FETCHING, AT_HOME, FETCHING, AT_HOME]
    core.access(3)  # nothing is ready: a fetch is given up
    assert states(core).count(FETCHING) == 1
    assert shows(core, 3)


def test_an_evicted_fetch_leaves_no_bytes_in_the_next_chunk_s_slot(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST, NVME, HOST])
    for _ in range(20):
        core.prefetch(0)
        core.prefetch(1)
        core.evict(0)
        core.evict(1)
        for chunk_id in (2, 3):
            core.access(chunk_id)
            assert shows(core, chunk_id)
            core.release(chunk_id)
        core.evict_idle()
        assert states(core) == [AT_HOME] * 4


def test_a_failed_fetch_returns_home_and_can_be_tried_again(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, NVME])
    assert core.resources.store is not None
    for chunk in core.chunks:
        chunk.home.finish_writes()
    with truncated_file(core.resources.store.path):
        for _ in range(NUM_SLOTS + 2):  # no slot and no staging buffer is lost
            with pytest.raises(OffloadIOError, match="the file ends before the bytes asked for"):
                core.access(1)
            assert states(core) == [AT_HOME, AT_HOME]
            assert core.slots.chunk_ids() == set()
    core.access(1)
    assert shows(core, 1)


def test_a_failed_prefetch_is_reported_by_the_chunk_s_own_access(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, NVME, HOST])
    assert core.resources.store is not None
    for chunk in core.chunks:
        chunk.home.finish_writes()
    with truncated_file(core.resources.store.path):
        core.prefetch(0)
        assert core.chunks[0].fetch is not None
        while not core.chunks[0].fetch.poll():
            pass
    core.poll()
    core.access(2)  # needs neither that chunk nor its error
    core.release(2)
    core.access(1)  # needs the only staging buffer on a device
    assert shows(core, 1)
    if core.chunks[0].fetch is None:  # it was given up to make room
        core.prefetch(0)
    else:
        with pytest.raises(OffloadIOError, match="the file ends before"):
            core.access(0)
    core.access(0)
    assert shows(core, 0)


def test_a_fetch_that_fails_at_its_start_returns_slot_and_staging(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST, HOST])
    core.chunks[0].home.finish_writes()
    break_writes(core.resources)
    core.chunks[0].home.write_tile(0, torch.zeros(12_288, dtype=torch.uint8))
    for _ in range(NUM_SLOTS + 1):
        with pytest.raises(OffloadIOError, match=r"cannot write .*: No space left on device"):
            core.access(0)
    assert states(core)[0] is AT_HOME
    assert core.slots.num_free() == NUM_SLOTS
    assert core._staging.is_free()
    for chunk_id in (1, 2):
        core.access(chunk_id)
        assert shows(core, chunk_id)


def test_no_staging_memory_is_an_error_that_loses_no_slot(tmp_path: Path) -> None:
    with small_resources(tmp_path, device="simulated") as resources:
        core = make_core(resources, [NVME, HOST, HOST], num_staging=0)
        for _ in range(3):
            with pytest.raises(OutOfTierMemoryError, match=r"host memory are needed between disk and device; raise"):
                core.access(0)
        assert states(core)[0] is AT_HOME
        core.access(1)
        core.access(2)
        assert shows(core, 1)
        assert shows(core, 2)


def test_an_update_evicts_the_copy_and_gives_the_chunk_back(make: Callable[..., ChunkCore]) -> None:
    core = make([HOST])
    core.ensure(0)
    core.begin_update(0)
    assert states(core) == [UPDATING]
    assert core.slots.chunk_ids() == set()
    with pytest.raises(IllegalTransitionError, match="is 'updating' and cannot become 'updating'"):
        core.begin_update(0)
    core.chunks[0].home.tile(0).view(torch.float32).fill_(7)
    core.end_update(0)
    core.access(0)
    assert bool((values(core, 0) == 7).all())
    with pytest.raises(IllegalTransitionError, match="is 'held' and cannot become 'at home'"):
        core.begin_update(0)


def test_a_resident_chunk_stays_and_takes_no_slot(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, HOST, HOST])
    core.chunks[0].is_resident = True
    core.residents.bring_in(0)
    assert shows(core, 0)
    for chunk_id in (1, 2, 0):
        core.access(chunk_id)
    assert core.slots.chunk_ids() == {1, 2}
    with pytest.raises(IllegalTransitionError, match="is 'held'"):
        core.residents.give_up(0)
    core.release(0)
    core.residents.give_up(0)
    assert states(core) == [AT_HOME, HELD, HELD]
    assert values(core, 0).isnan().all()


def test_close_gives_everything_back_with_work_under_way(make: Callable[..., ChunkCore]) -> None:
    core = make([NVME, NVME, HOST])
    core.prefetch(0)
    core.access(2)
    core.close()
    core.close()
    assert states(core) == [ChunkState.CLOSED] * 3
    resources = core.resources
    assert resources.ledger.held_nbytes(HOST) == resources.ledger.held_nbytes(DEVICE) == 0
    assert resources.store is not None
    assert resources.store.held_nbytes == 0
    with pytest.raises(IllegalTransitionError, match="is 'closed' and cannot become"):
        core.begin_update(2)
