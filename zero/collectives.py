"""The seam between chunks and the network: what ranks tell each other about one chunk.

A chunk of `numel` elements is cut into `world_size` shards of equal length, shard r belonging to rank r; whoever packs
chunks pads them so that the cut is even. Every rank calls the same operations in the same order, and one chunk's
operation is one call: batching and overlap are the caller's, who issues calls on the stream of their choice. This
module must not know tiers, plans or optimizers; it sees buffers and nothing else.
"""

from __future__ import annotations

import enum
from typing import Protocol

import torch

__all__ = ["ChunkCollectives", "ScalarReduction", "SingleProcess"]


class ScalarReduction(enum.Enum):
    """How one number of every rank becomes one number."""

    SUM = "sum"
    """For sums of squares: the global gradient norm."""
    MAX = "max"
    """For flags and peaks: any rank's non-finite gradient, the largest bytes held."""


class ChunkCollectives(Protocol):
    """What the runtime asks of a group of ranks.

    Tensor operations are queued on the current stream of the tensors' device, where their result is then valid; they
    may return before the bytes have moved. The caller keeps the buffers alive and unchanged until then.
    """

    @property
    def rank(self) -> int:
        """This process's place in the group, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes in the group."""
        ...

    def all_gather_chunk(self, shard: torch.Tensor, out: torch.Tensor) -> None:
        """Make a whole chunk of every rank's shard.

        Args:
            shard: this rank's slice, [numel / world_size], contiguous; read only. May be the rank's own part of `out`.
            out: the chunk, [numel], contiguous, same dtype and device; overwritten.

        Raises:
            ValueError: lengths, dtypes or devices do not fit together.
        """
        ...

    def reduce_scatter_chunk(self, chunk_grad: torch.Tensor, out_shard: torch.Tensor) -> None:
        """Sum a chunk's gradient over the ranks and keep this rank's slice; the caller divides where it wants a mean.

        Args:
            chunk_grad: this rank's gradient of the chunk, [numel], contiguous; its content is undefined afterwards.
            out_shard: the sum's slice, [numel / world_size], contiguous, same dtype and device; overwritten. May be
                the rank's own part of `chunk_grad`.

        Raises:
            ValueError: lengths, dtypes or devices do not fit together.
        """
        ...

    def all_reduce_scalar(self, value: float, *, reduction: ScalarReduction) -> float:
        """Combine one number of every rank. Blocks until all ranks have called.

        Args:
            value: this rank's number; not-a-number spreads to all ranks.
            reduction: how to combine.

        Returns:
            The combined number, the same bits on every rank.
        """
        ...

    def barrier(self) -> None:
        """Wait until every rank has called."""
        ...


class SingleProcess:
    """A group of one: every operation is the identity, and nothing is copied that already is where it should be."""

    @property
    def rank(self) -> int:
        """Always 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Always 1."""
        return 1

    def all_gather_chunk(self, shard: torch.Tensor, out: torch.Tensor) -> None:
        """Copy the only shard into the chunk; see `ChunkCollectives`.

        Args:
            shard: the whole chunk, [numel]; read only.
            out: the chunk, [numel]; overwritten.

        Raises:
            ValueError: lengths, dtypes or devices differ.
        """
        _copy_unless_same("all_gather_chunk", shard, out)

    def reduce_scatter_chunk(self, chunk_grad: torch.Tensor, out_shard: torch.Tensor) -> None:
        """Copy the only gradient into the only slice; see `ChunkCollectives`.

        Args:
            chunk_grad: gradient of the chunk, [numel]; read only.
            out_shard: the slice, [numel]; overwritten.

        Raises:
            ValueError: lengths, dtypes or devices differ.
        """
        _copy_unless_same("reduce_scatter_chunk", chunk_grad, out_shard)

    def all_reduce_scalar(self, value: float, *, reduction: ScalarReduction) -> float:
        """Return the only number.

        Args:
            value: the number.
            reduction: ignored: every reduction of one number is that number.

        Returns:
            `value`.
        """
        return value

    def barrier(self) -> None:
        """Return at once."""


def _copy_unless_same(operation: str, source: torch.Tensor, target: torch.Tensor) -> None:
    source_kind = (source.numel(), source.dtype, source.device)
    target_kind = (target.numel(), target.dtype, target.device)
    if source_kind != target_kind:
        raise ValueError(
            f"{operation} with 1 rank: expected source and target of the same length, dtype and device, got "
            f"{source_kind} and {target_kind}"
        )
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)
