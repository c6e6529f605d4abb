"""Updates that the end of the process may interrupt at any instruction: which memory they note their progress in.

Plain memory and numbers; which parameters a block belongs to is for others to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor

from gemini._native import ffi, lib
from gemini.kernels.adam_tile import AdamTile
from gemini.kernels.cpu import Isa, check_status, make_adam_args

__all__ = [
    "BLOCK_NUMEL",
    "SCRATCH_NBYTES",
    "JournalStop",
    "ScratchImage",
    "TileJournal",
    "adam_update_partly",
    "make_journal_args",
    "read_scratch",
]

BLOCK_NUMEL: int = lib.GN_JOURNAL_BLOCK_NUMEL
"""Elements that become new together."""
SCRATCH_NBYTES: int = lib.GN_JOURNAL_SCRATCH_NBYTES
"""Bytes in which one thread keeps what a block was before its update."""


class JournalStop(Enum):
    """Where in a block an update ends early; values are gn_journal_stop."""

    COPIED = lib.GN_STOP_COPIED
    NOTED = lib.GN_STOP_NOTED
    UPDATED = lib.GN_STOP_UPDATED
    WHOLE = lib.GN_STOP_WHOLE


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TileJournal:
    """Where the update of one tile notes its progress; see gn_adam_journal."""

    sequence: int
    """More than 0; another one for each update."""
    first_block: int
    """Number of the tile's first block."""
    done: Tensor
    """int32, one entry for each block of the tile: the sequence of the last update that it has had."""
    scratches: Tensor
    """uint8 [threads or more * SCRATCH_NBYTES], aligned to 64 bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class ScratchImage:
    """What a block was before an update."""

    sequence: int
    """Of the update; 0: there is no image."""
    block: int
    image: Tensor
    """uint8: working weights, master, momentum and variance of the block, one after the other; longer than they are."""


def read_scratch(scratches: Tensor, thread: int) -> ScratchImage:
    """Return what the scratch of a thread, numbered from 0, holds."""
    scratch = scratches[thread * SCRATCH_NBYTES : (thread + 1) * SCRATCH_NBYTES]
    word = int.from_bytes(scratch[:8].numpy().tobytes(), "little")
    return ScratchImage(word >> 32, word & 0xFFFFFFFF, scratch[lib.GN_JOURNAL_IMAGE_OFFSET :])


def make_journal_args(journal: TileJournal) -> Any:
    """Return a gn_adam_journal; the caller keeps the tensors alive."""
    args = ffi.new("gn_adam_journal *")
    args.sequence, args.first_block = journal.sequence, journal.first_block
    args.done = ffi.cast("uint32_t *", journal.done.data_ptr())
    args.scratches = ffi.cast("void *", journal.scratches.data_ptr())
    args.num_scratches = journal.scratches.numel() // SCRATCH_NBYTES
    return args


def adam_update_partly(tile: AdamTile, journal: TileJournal, *, block: int, stop: JournalStop) -> None:
    """Leave memory as an update does that ends with the process in the middle of a block, for tests. Blocking.

    Args:
        tile: what is updated, as far as `block`.
        journal: the update's; the first scratch is used.
        block: the block that the update ends in, counted from the tile's first; those before it are updated.
        stop: where in it.

    Raises:
        ValueError: there is no such block, or the journal is malformed.
    """
    args, _segments = make_adam_args(tile, Isa.AUTO)
    status = lib.gn_adam_update_partly(args, make_journal_args(journal), block, stop.value)
    check_status(status, "adam_update_partly", Isa.AUTO)
