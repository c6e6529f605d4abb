"""Gradients between ranks: each gets the mean of its part of what all of them have.

A chunk that is assembled in a slot is sent at once. A chunk that does not fit a slot, or is kept whole elsewhere, is
sent in pieces: some elements of every rank's shard at a time, copied together into a slot. Sums are computed in float32
and in rank order, so no sum overflows in half precision and all runs give the same bits; implementations of
gemini.ranks.sharding.PartSums decide how. With several replicas of the model, the sums pass through
gemini.gradients.replica_sums before they become means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from gemini.chunk.layout import ChunkSpec
from gemini.errors import GeminiError
from gemini.gradients.replica_sums import ReplicaSums
from gemini.ranks.sharding import ChunkShard, PartSums, PendingSum, ShardGroup

__all__ = ["ExchangeSlot", "GradientExchange", "copy_piece", "mean_of_sum"]


@dataclass(eq=False)
class ExchangeSlot:
    """Room for one exchange."""

    index: int
    """Its place among the slots."""
    sent: torch.Tensor
    """uint8; gradients of a whole chunk, or of a piece of every shard, in the working dtype and in rank order."""


@dataclass(eq=False)
class _Piece:
    """Some elements of every shard of a chunk, on their way."""

    spec: ChunkSpec
    shard: ChunkShard
    begin: int
    numel: int
    slot: ExchangeSlot
    under_way: PendingSum
    mean: torch.Tensor | None
    """Takes the mean, the whole shard's; None: the piece is all of it."""

    @property
    def is_last(self) -> bool:
        return self.begin + self.numel == self.shard.numel


class GradientExchange:
    """Exchanges of one engine, in the order of their requests.

    Args:
        group: the ranks.
        sums: adds up what the ranks have; closed with this.
        device: device of compute memory.
        deliver: takes the mean of this rank's shard of a chunk's gradients, [shard numel] of the working dtype, in host
            memory if sums are there, else in compute memory.
    """

    def __init__(
        self,
        group: ShardGroup,
        sums: PartSums,
        device: torch.device,
        *,
        deliver: Callable[[ChunkSpec, ChunkShard, torch.Tensor], None],
    ) -> None:
        self._group = group
        self._sums = sums
        self._replica_sums = ReplicaSums(group) if group.grid.num_replicas > 1 else None
        self._device = device
        self._slot_nbytes = sums.slot_nbytes
        self._deliver = deliver
        self._free = [ExchangeSlot(index, sent) for index, sent in enumerate(sums.slots)]
        self._under_way: deque[_Piece] = deque()

    def fits(self, spec: ChunkSpec, shard: ChunkShard) -> bool:
        """Return whether a slot has room for a whole chunk."""
        return shard.whole_numel * spec.dtype.itemsize <= self._slot_nbytes

    def claim(self, num_left: int = 0) -> ExchangeSlot | None:
        """Take an empty slot, waiting for exchanges under way if need be.

        Args:
            num_left: slots that must be left.

        Returns:
            The slot; None if waiting does not help.
        """
        while len(self._free) <= num_left and self._under_way:
            self._arrive()
        return self._free.pop() if len(self._free) > num_left else None

    def give_back(self, slot: ExchangeSlot) -> None:
        """Take back a slot that was claimed and is not sent."""
        self._free.append(slot)

    def send(self, spec: ChunkSpec, shard: ChunkShard, slot: ExchangeSlot) -> None:
        """Start exchanging the whole chunk that a slot holds; the slot is given back, also by an error."""
        self._start(spec, shard, slot, 0, shard.numel, None)

    def send_in_pieces(self, spec: ChunkSpec, shard: ChunkShard, gradients: Mapping[int, torch.Tensor]) -> None:
        """Start exchanging gradients that lie elsewhere; they are read before this returns.

        Args:
            spec: the chunk's.
            shard: this rank's.
            gradients: flat, any float dtype, by position in the chunk; the others are zero. One slot must be free, or
                under way.
        """
        piece_numel = min(self._slot_nbytes // (shard.num_ranks * spec.dtype.itemsize), shard.numel)
        mean = None
        if piece_numel < shard.numel:
            mean = torch.empty(shard.numel, dtype=spec.dtype, device="cpu" if self._sums.are_on_host else self._device)
        for begin in range(0, shard.numel, piece_numel):
            numel = min(piece_numel, shard.numel - begin)
            slot = self.claim()
            assert slot is not None, "whoever claims slots leaves one"
            sent = slot.sent.view(spec.dtype)[: shard.num_ranks * numel].view(shard.num_ranks, numel).zero_()
            for position, flat in gradients.items():
                copy_piece(sent, flat, at=spec.places[position].begin - begin, stride=shard.numel)
            self._start(spec, shard, slot, begin, numel, mean)

    def _start(
        self,
        spec: ChunkSpec,
        shard: ChunkShard,
        slot: ExchangeSlot,
        begin: int,
        numel: int,
        mean: torch.Tensor | None,
    ) -> None:
        divisor = self._group.grid.num_batches if self._replica_sums is None else None
        name = f"gradients of {spec.name}"
        try:
            under_way = self._sums.start(slot.index, numel=numel, dtype=spec.dtype, divisor=divisor, name=name)
        except GeminiError:
            self._free.append(slot)
            raise
        self._under_way.append(_Piece(spec, shard, begin, numel, slot, under_way, mean))
        if self._replica_sums is not None:
            while len(self._under_way) > 1:
                self._arrive()
            self._replica_sums.advance()

    def _arrive(self) -> None:
        """Wait for the oldest exchange and take its sum; starts nothing, for ranks may come here at different times."""
        piece = self._under_way.popleft()
        try:
            result = piece.under_way.wait()
        finally:
            self._free.append(piece.slot)
        if self._replica_sums is None:
            self._take_mean(piece, result)
        else:
            total = result.to(self._device)
            self._replica_sums.add(total, name=f"sums of {piece.spec.name}", deliver=partial(self._take_sum, piece))

    def _take_sum(self, piece: _Piece, total: torch.Tensor) -> None:
        """Make the mean of a sum over all replicas, which is overwritten."""
        mean = mean_of_sum(total, self._group.grid.num_batches, piece.spec.dtype)
        self._take_mean(piece, mean.cpu() if self._sums.are_on_host else mean)

    def _take_mean(self, piece: _Piece, mean: torch.Tensor) -> None:
        """Take the mean of a piece, and hand that of the shard on when it is complete."""
        if piece.mean is not None:
            piece.mean[piece.begin : piece.begin + piece.numel] = mean
            mean = piece.mean
        if piece.is_last:
            self._deliver(piece.spec, piece.shard, mean)

    def finish(self) -> None:
        """Deliver the means of all running exchanges."""
        while self._under_way:
            self._arrive()
        if self._replica_sums is not None:
            self._replica_sums.finish()

    def abandon(self) -> None:
        """Wait for everything under way, and start nothing; what that leaves incomplete is forgotten."""
        while self._under_way:
            self._arrive()
        if self._replica_sums is not None:
            self._replica_sums.abandon()

    def close(self) -> None:
        """Wait for running exchanges, even if they fail, and give all slots back; none may be claimed afterwards."""
        if self._replica_sums is not None:
            self._replica_sums.abandon()
        while self._under_way:
            piece = self._under_way.popleft()
            self._free.append(piece.slot)
            with suppress(GeminiError):
                piece.under_way.wait()
        self._free = []
        self._sums.close()


def copy_piece(rows: torch.Tensor, flat: torch.Tensor, *, at: int, stride: int) -> None:
    """Copy those elements of a run that fall into rows, which lie at equal distances on a line.

    Args:
        rows: [num_rows, numel]; row i covers the line from `i * stride` on; written where the run is.
        flat: the run, 1D, any dtype.
        at: where on the line the run begins; may be negative.
        stride: from one row's first element to the next one's, at least numel.
    """
    for i, row in enumerate(rows):
        first = i * stride - at  # of the run, in this row's first place
        begin, end = max(first, 0), min(first + row.numel(), flat.numel())
        if begin < end:
            row[begin - first : end - first].copy_(flat[begin:end])


def mean_of_sum(total: torch.Tensor, num_summands: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the mean that belongs to a sum, rounded once.

    Args:
        total: float32; overwritten.
        num_summands: how many were added.
        dtype: float32, bfloat16 or float16.

    Returns:
        The mean, of `dtype`. It overflows only where it is itself out of range.
    """
    return total.div_(num_summands).to(dtype)
