"""Progress of updates in memory, for updates that the process's end may interrupt at any instruction.

Plain memory and numbers; does not know which parameters a block belongs to.
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
"""Number of elements that an update replaces as one unit."""
SCRATCH_NBYTES: int = lib.GN_JOURNAL_SCRATCH_NBYTES
"""Bytes in which one thread keeps a block's content from before its update."""


class JournalStop(Enum):
    """Point in a block at which an update ends early; values are gn_journal_stop."""

    COPIED = lib.GN_STOP_COPIED
    NOTED = lib.GN_STOP_NOTED
    UPDATED = lib.GN_STOP_UPDATED
    WHOLE = lib.GN_STOP_WHOLE


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TileJournal:
    """The memory in which one tile's update notes its progress; see gn_adam_journal."""

    sequence: int
    """Sequence number of the update, more than 0; each update has another one."""
    first_block: int
    """Number of the tile's first block."""
    done: Tensor
    """Sequence number of the last update of each block of the tile, int32."""
    scratches: Tensor
    """Scratch memory: uint8 [threads or more * SCRATCH_NBYTES], aligned to 64 bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class ScratchImage:
    """Content of a block before an update."""

    sequence: int
    """Sequence number of the update; 0 if there is no image."""
    block: int
    image: Tensor
    """Working weights, master, momentum and variance of the block, one after the other: uint8, longer than they are."""


def read_scratch(scratches: Tensor, thread: int) -> ScratchImage:
    """Return the content of a thread's scratch; threads are numbered from 0."""
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
    """Leave memory as an update does that is killed in the middle of a block, for tests. Blocking.

    Args:
        tile: the tile, which is updated up to `block`.
        journal: the update's journal; the first scratch is used.
        block: the block in which the update ends, counted from the tile's first; earlier blocks are updated.
        stop: the point in the block.

    Raises:
        ValueError: the block does not exist, or the journal is malformed.
    """
    args, _segments = make_adam_args(tile, Isa.AUTO)
    status = lib.gn_adam_update_partly(args, make_journal_args(journal), block, stop.value)
    check_status(status, "adam_update_partly", Isa.AUTO)
