"""Where a chunk's bytes live: rows of tiles over three tiers."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_resources import break_writes, random_bytes, small_resources, truncated_file

from gemini.errors import OffloadIOError, OutOfTierMemoryError
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.tiers import MemoryTier

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME


@pytest.fixture
def resources(tmp_path: Path) -> Iterator[Resources]:
    with small_resources(tmp_path) as made:
        yield made


def make_home(resources: Resources, tiers: list[MemoryTier], tile_nbytes: list[int] | None = None) -> TiledHome:
    sizes = tile_nbytes or [4096] * len(tiers)
    return TiledHome(tiers, sizes, arena=resources.arena, store=resources.store, purpose="state")


def test_each_tier_holds_its_tiles_and_nothing_else(resources: Resources) -> None:
    home = make_home(resources, [HOST, NVME, NVME, HOST], [8192, 4096, 12_288, 4096])
    assert [home.nbytes(tier) for tier in (DEVICE, HOST, NVME)] == [0, 12_288, 16_384]
    assert resources.ledger.by_purpose(HOST) == {"state": 12_288}
    assert resources.store is not None
    assert resources.store.held_nbytes == 16_384
    home.close()
    assert resources.ledger.held_nbytes(HOST) == resources.store.held_nbytes == 0
    home.close()


def test_runs_are_maximal_and_contiguous(resources: Resources) -> None:
    home = make_home(resources, [HOST, NVME, NVME, HOST], [8192, 4096, 12_288, 4096])
    found = [(run.tier, run.first_tile, run.begin, run.nbytes, run.home_offset) for run in home.runs()]
    assert found == [(HOST, 0, 0, 8192, 0), (NVME, 1, 8192, 16_384, 0), (HOST, 3, 24_576, 4096, 8192)]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([HOST, NVME]), st.integers(1, 3)), min_size=1, max_size=6))
def test_tiles_keep_their_bytes_apart(resources: Resources, tiles: list[tuple[MemoryTier, int]]) -> None:
    home = make_home(resources, [tier for tier, _ in tiles], [4096 * pages for _, pages in tiles])
    contents = [random_bytes(n, seed) for seed, n in enumerate(home.tile_nbytes)]
    for index, content in enumerate(contents):
        if home.tiers[index] is NVME:
            home.write_tile(index, content)
        else:
            home.tile(index).copy_(content)
    whole = torch.cat(contents)
    for run in home.runs():
        found = torch.zeros(run.nbytes, dtype=torch.uint8)
        if run.tier is NVME:
            home.read_run(run, found).wait()
        else:
            assert home.host_buffer is not None
            found = home.host_buffer[run.home_offset : run.home_offset + run.nbytes]
        assert torch.equal(found, whole[run.begin : run.begin + run.nbytes])
    home.close()


def test_a_read_waits_for_writes_of_the_same_home(resources: Resources) -> None:
    home = make_home(resources, [NVME], [1 << 20])
    found = torch.zeros(1 << 20, dtype=torch.uint8)
    for seed in range(10):
        home.write_tile(0, random_bytes(1 << 20, seed))
        home.read_tile(0, found).wait()
        assert not home.is_being_written()
        assert torch.equal(found, random_bytes(1 << 20, seed))


def test_a_device_home_lies_in_one_buffer_and_gives_it_back() -> None:
    with small_resources(device="simulated") as resources:
        home = TiledHome(
            [DEVICE, DEVICE],
            [8192, 4096],
            arena=resources.arena,
            store=None,
            transfers=resources.transfers,
            purpose="state",
        )
        assert home.device_buffer is not None
        assert home.tile(1).data_ptr() == home.device_buffer.data_ptr() + 8192
        assert home.tile(1).numel() == 4096
        assert not home.is_on_disk
        assert resources.ledger.by_purpose(DEVICE) == {"state": 12_288}
        home.close()
        assert home.device_buffer is None
        assert resources.ledger.by_purpose(DEVICE) == {}


class Stopped(Exception):
    """What goes wrong while a tile is open."""


def spoil(content: torch.Tensor) -> None:
    """Change a tile and fail."""
    content.zero_()
    raise Stopped


@pytest.fixture(params=[DEVICE, HOST, NVME], ids=lambda tier: tier.name.lower())
def two_tiles(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[TiledHome, Resources]]:
    """A home of two tiles in one tier, which hold random bytes of seeds 0 and 1."""
    with small_resources(tmp_path, device="simulated") as resources:
        home = TiledHome(
            [request.param] * 2,
            [8192, 4096],
            arena=resources.arena,
            store=resources.store,
            transfers=resources.transfers,
            purpose="state",
        )
        for tile, nbytes in enumerate(home.tile_nbytes):
            with home.opened(tile, resources.transfers, write=True) as content:
                content.copy_(random_bytes(nbytes, seed=tile))
        yield home, resources


def test_an_opened_tile_can_be_read_and_changed(two_tiles: tuple[TiledHome, Resources]) -> None:
    home, resources = two_tiles
    with home.opened(1, resources.transfers, write=True) as content:
        assert torch.equal(content, random_bytes(4096, seed=1))
        content[100] += 1
    expected = random_bytes(4096, seed=1)
    expected[100] += 1
    with home.opened(1, resources.transfers) as content:
        assert torch.equal(content, expected)
    with home.opened(0, resources.transfers) as content:
        assert torch.equal(content, random_bytes(8192, seed=0))


def test_after_an_exception_only_host_memory_has_changed(two_tiles: tuple[TiledHome, Resources]) -> None:
    home, resources = two_tiles
    with pytest.raises(Stopped), home.opened(1, resources.transfers, write=True) as content:
        spoil(content)
    with home.opened(1, resources.transfers) as content:
        assert bool(content.any()) == (home.tiers[1] is not HOST)


def test_a_tile_that_cannot_be_written_back_says_so(resources: Resources) -> None:
    home = make_home(resources, [NVME])
    with (
        pytest.raises(OffloadIOError, match=r"cannot write .* 4096 bytes at offset 4096, 0 done"),
        home.opened(0, resources.transfers, write=True),
    ):
        break_writes(resources)


def test_a_read_beyond_the_end_of_the_file_says_where(resources: Resources) -> None:
    home = make_home(resources, [NVME, NVME])
    assert resources.store is not None
    home.write_tile(1, random_bytes(4096))
    home.finish_writes()
    into = torch.zeros(4096, dtype=torch.uint8)
    with truncated_file(resources.store.path):
        ticket = home.read_tile(1, into)
        message = r"cannot read .*gemini-rank0.swap: 4096 bytes at offset 8192, 0 done: .* the file ends before"
        with pytest.raises(OffloadIOError, match=message) as caught:
            ticket.wait()
    assert caught.value.errno == errno.ENODATA
    home.read_tile(1, into).wait()
    assert torch.equal(into, random_bytes(4096))


def test_a_failed_write_is_reported_by_every_later_read(resources: Resources) -> None:
    home = make_home(resources, [NVME, NVME])
    break_writes(resources)
    home.write_tile(0, random_bytes(4096))
    for _ in range(2):
        with pytest.raises(OffloadIOError, match=r"cannot write .* 4096 bytes at offset 4096, 0 done"):
            home.read_tile(1, torch.zeros(4096, dtype=torch.uint8))


def test_closing_after_a_failed_write_gives_the_space_back(resources: Resources) -> None:
    home = make_home(resources, [HOST, NVME])
    other = make_home(resources, [NVME])
    break_writes(resources)
    other.write_tile(0, random_bytes(4096))
    other.close()
    home.close()
    assert resources.store is not None
    assert resources.store.held_nbytes == 0
    assert resources.ledger.held_nbytes(HOST) == 0


def test_a_home_larger_than_the_disk_takes_nothing(resources: Resources) -> None:
    with pytest.raises(OutOfTierMemoryError):
        make_home(resources, [HOST, NVME], [4096, 8 << 20])
    assert resources.ledger.held_nbytes(HOST) == 0


def test_a_home_larger_than_the_host_takes_no_disk(resources: Resources) -> None:
    with pytest.raises(OutOfTierMemoryError, match=r"^host tier: .* more for state exceed the budget"):
        make_home(resources, [NVME, HOST], [4096, 128 << 20])
    assert resources.store is not None
    assert resources.store.held_nbytes == 0


@pytest.mark.parametrize("tier", [HOST, NVME])
def test_a_second_place_is_read_from_the_flip_on_and_the_first_becomes_the_second(
    resources: Resources, tier: MemoryTier
) -> None:
    home = TiledHome(
        [tier] * 3, [4096] * 3, arena=resources.arena, store=resources.store, spare_tiles=[1, 2], purpose="state"
    )
    transfers = resources.transfers
    old, new, newer = (random_bytes(4096, seed) for seed in range(3))

    def write_ahead(content: torch.Tensor) -> None:
        if tier is NVME:
            home.write_tile(1, content, ahead=True)
        else:
            home.tile(1, ahead=True).copy_(content)

    def read(tile: int) -> torch.Tensor:
        with home.opened(tile, transfers) as content:
            return content.clone()

    for tile in range(3):
        with home.opened(tile, transfers, write=True) as content:
            content.copy_(old)
    for content, before in ((new, old), (newer, new)):
        write_ahead(content)
        assert torch.equal(read(1), before)
        home.flip([1])
        assert torch.equal(read(1), content)
        assert torch.equal(read(0), old)
        assert torch.equal(read(2), old)
    home.close()
    assert resources.ledger.held_nbytes(HOST) == 0


def test_a_row_with_a_tile_in_its_second_place_is_in_more_runs(resources: Resources) -> None:
    home = TiledHome([HOST] * 3, [4096] * 3, arena=resources.arena, store=None, spare_tiles=[1], purpose="state")
    contents = [random_bytes(4096, seed) for seed in range(3)]
    for tile, content in enumerate(contents):
        home.tile(tile, ahead=tile == 1).copy_(content)
    assert [run.nbytes for run in home.runs()] == [12_288]
    home.flip([1])
    assert [run.nbytes for run in home.runs()] == [4096] * 3
    assert torch.equal(torch.cat([home.memory_of(run) for run in home.runs()]), torch.cat(contents))
    home.close()


def test_second_places_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    with small_resources(tmp_path, host_budget=20_480) as resources:
        held = resources.ledger.held_nbytes(HOST)
        with pytest.raises(OutOfTierMemoryError):
            TiledHome([HOST] * 3, [4096] * 3, arena=resources.arena, store=None, spare_tiles=[0, 1, 2], purpose="state")
        assert resources.ledger.held_nbytes(HOST) == held
