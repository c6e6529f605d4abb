"""An update with a journal has the plain update's bits, and can be finished wherever it has ended."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gemini.kernels.adam_tile import AdamHyper, AdamSegment, AdamTile
from gemini.kernels.cpu import adam_update
from gemini.kernels.journal import (
    BLOCK_NUMEL,
    SCRATCH_NBYTES,
    JournalStop,
    TileJournal,
    adam_update_partly,
    read_scratch,
)
from gemini.kernels.pool import WorkerPool

NUMEL = 3 * BLOCK_NUMEL + 5
NUM_THREADS = 2
HYPER = AdamHyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
SEGMENTS = (
    AdamSegment(begin=3, end=BLOCK_NUMEL + 7, hyper=HYPER, step=4),
    AdamSegment(begin=2 * BLOCK_NUMEL, end=NUMEL, hyper=dataclasses.replace(HYPER, lr=0.5), step=1),
)
MASTERS = {torch.float32: None, torch.bfloat16: torch.int16, torch.float16: torch.float32}


def make_tile(dtype: torch.dtype) -> AdamTile:
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(NUMEL, generator=generator)

    kind = MASTERS[dtype]
    master = None if kind is None else (noise() * 100).to(kind)
    return AdamTile(noise().to(dtype), master, noise(), noise().square_(), noise().to(dtype), 0.5, SEGMENTS)


def make_journal(sequence: int = 5) -> TileJournal:
    return TileJournal(
        sequence=sequence,
        first_block=7,
        done=torch.zeros(-(-NUMEL // BLOCK_NUMEL), dtype=torch.int32),
        scratches=torch.zeros(NUM_THREADS * SCRATCH_NBYTES, dtype=torch.uint8),
    )


def parts_of(tile: AdamTile) -> list[torch.Tensor]:
    return [part for part in (tile.working, tile.master, tile.momentum, tile.variance) if part is not None]


def bytes_of(tile: AdamTile) -> list[bytes]:
    return [part.view(torch.uint8).numpy().tobytes() for part in parts_of(tile)]


def restore(tile: AdamTile, journal: TileJournal) -> None:
    """Copy the images back whose blocks are not done, as recovery does."""
    for thread in range(NUM_THREADS):
        found = read_scratch(journal.scratches, thread)
        block = found.block - journal.first_block
        if found.sequence != journal.sequence or journal.done[block] == found.sequence:
            continue
        begin, end = block * BLOCK_NUMEL, min(NUMEL, (block + 1) * BLOCK_NUMEL)
        offset = 0
        for part in parts_of(tile):
            nbytes = (end - begin) * part.itemsize
            part[begin:end].view(torch.uint8).copy_(found.image[offset : offset + nbytes])
            offset += nbytes


@pytest.fixture(params=MASTERS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def test_a_journal_changes_no_bit(dtype: torch.dtype) -> None:
    plain, journalled, journal = make_tile(dtype), make_tile(dtype), make_journal()
    adam_update(plain)
    with WorkerPool(NUM_THREADS) as pool:
        pool.submit_adam(journalled, journal=journal).wait()
        pool.submit_adam(journalled, journal=journal).wait()  # all is done, so nothing happens
    assert bytes_of(journalled) == bytes_of(plain)
    assert journal.done.tolist() == [5] * 4


@pytest.mark.parametrize("stop", JournalStop)
@pytest.mark.parametrize("block", range(4))
def test_an_update_that_ended_anywhere_can_be_finished(dtype: torch.dtype, block: int, stop: JournalStop) -> None:
    plain, interrupted, journal = make_tile(dtype), make_tile(dtype), make_journal()
    adam_update(plain)
    adam_update_partly(interrupted, journal, block=block, stop=stop)
    assert journal.done.tolist() == [5] * block + [0] * (4 - block)
    restore(interrupted, journal)
    with WorkerPool(NUM_THREADS) as pool:
        pool.submit_adam(interrupted, journal=journal).wait()
    assert bytes_of(interrupted) == bytes_of(plain)


def test_without_its_image_half_a_block_is_lost(dtype: torch.dtype) -> None:
    plain, interrupted, journal = make_tile(dtype), make_tile(dtype), make_journal()
    adam_update(plain)
    adam_update_partly(interrupted, journal, block=0, stop=JournalStop.UPDATED)
    with WorkerPool(NUM_THREADS) as pool:
        pool.submit_adam(interrupted, journal=journal).wait()
    assert bytes_of(interrupted) != bytes_of(plain)


def test_a_scratch_says_whose_image_it_holds() -> None:
    tile, journal = make_tile(torch.float32), make_journal(sequence=9)
    before = tile.working[BLOCK_NUMEL : 2 * BLOCK_NUMEL].clone()
    adam_update_partly(tile, journal, block=1, stop=JournalStop.NOTED)
    found = read_scratch(journal.scratches, 0)
    assert (found.sequence, found.block) == (9, 8)
    assert torch.equal(found.image[: 4 * BLOCK_NUMEL].view(torch.float32), before)
    assert read_scratch(journal.scratches, 1).sequence == 0


def test_a_journal_needs_a_scratch_for_each_thread() -> None:
    tile, journal = make_tile(torch.float32), make_journal()
    with WorkerPool(NUM_THREADS + 1) as pool, pytest.raises(ValueError, match="adam update"):
        pool.submit_adam(tile, journal=journal)


@pytest.mark.parametrize(("block", "sequence"), [(4, 1), (-1, 1), (0, 0)])
def test_a_malformed_partial_update_is_refused(block: int, sequence: int) -> None:
    tile, journal = make_tile(torch.float32), make_journal(sequence)
    with pytest.raises(ValueError, match="adam_update_partly"):
        adam_update_partly(tile, journal, block=block, stop=JournalStop.NOTED)
