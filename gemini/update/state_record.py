"""What lies where in a tile's state record, and how a master is split between the record and the working weights.

For bfloat16 the working weight is the upper half of the master and the record has the lower one, an int16 residual; for
float16 the record has the master; for float32 the working weight is the master. Plans count the bytes of a record with
gemini.placement.plan.state_record_nbytes, which knows no torch; `record_views` holds itself to that count.
"""

from __future__ import annotations

import torch

from gemini.kernels.adam_tile import state_format_of
from gemini.kernels.cpu import Isa, cast, join_master, split_master
from gemini.kernels.device_tile import RecordOffsets
from gemini.placement.plan import state_record_nbytes
from gemini.tiers import IO_ALIGNMENT_NBYTES, round_up

__all__ = ["follow_changes", "join_masters", "record_offsets", "record_views", "split_masters"]


def record_offsets(length: int, working_dtype: torch.dtype) -> RecordOffsets:
    """Return where the parts of a tile's record are.

    Args:
        length: elements in the tile.
        working_dtype: dtype of the working weights, which decides the master's.

    Returns:
        The offsets; each part is padded for direct I/O.
    """
    master_dtype = state_format_of(working_dtype).master_dtype
    master_itemsize = 0 if master_dtype is None else master_dtype.itemsize
    momentum = round_up(length * master_itemsize, IO_ALIGNMENT_NBYTES)
    variance = momentum + round_up(length * 4, IO_ALIGNMENT_NBYTES)
    return RecordOffsets(momentum=momentum, variance=variance, nbytes=state_record_nbytes(length, master_itemsize))


def record_views(
    record: torch.Tensor, length: int, working_dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Cut a state record into its parts.

    Args:
        record: uint8, one tile's record: master, momentum, variance, each padded for direct I/O.
        length: elements in the tile.
        working_dtype: dtype of the working weights, which decides the master's.

    Returns:
        master ([length] int16 or float32, None where the working weight is the master), momentum and variance
        (float32 [length]).
    """
    offsets = record_offsets(length, working_dtype)
    master_dtype = state_format_of(working_dtype).master_dtype
    master = None if master_dtype is None else record[: length * master_dtype.itemsize].view(master_dtype)
    momentum, variance = (
        record[begin : begin + 4 * length].view(torch.float32) for begin in (offsets.momentum, offsets.variance)
    )
    return master, momentum, variance


def join_masters(into: torch.Tensor, working: torch.Tensor, rest: torch.Tensor | None) -> None:
    """Put masters together.

    Args:
        into: float32 [n], on the CPU; overwritten.
        working: the working weights, [n].
        rest: what the record has of the masters, [n]; None where working weights are masters.
    """
    if rest is None:
        into.copy_(working)
    elif rest.dtype is torch.int16:
        join_master(into, working, rest)
    else:
        into.copy_(rest)


def split_masters(
    working: torch.Tensor, rest: torch.Tensor | None, source: torch.Tensor, *, isa: Isa = Isa.AUTO
) -> None:
    """Split float32 masters into working weights and what the state record has of the rest.

    Args:
        working: the working weights, [n], on the CPU; overwritten.
        rest: what the record has of the masters, [n]; None where working weights are masters; overwritten.
        source: the masters, float32 [n], contiguous.
        isa: instruction set of the kernels.
    """
    if rest is None:
        working.copy_(source)
    elif rest.dtype is torch.int16:
        split_master(working, rest, source, isa=isa)
    else:
        cast(rest, source, isa=isa)
        cast(working, source, isa=isa)


def follow_changes(rest: torch.Tensor, new: torch.Tensor, before: torch.Tensor) -> None:
    """Let masters of half-precision weights follow where the weights' bits have changed.

    Args:
        rest: what the record has of the masters, [n]; changed there.
        new: the working weights, [n].
        before: what they were.
    """
    changed = new.view(torch.int16) != before.view(torch.int16)
    if rest.dtype is torch.int16:
        residual = torch.empty_like(rest)
        split_master(torch.empty_like(new), residual, new.to(torch.float32))
    else:
        residual = new.to(torch.float32)
    rest.copy_(torch.where(changed, residual, rest))
