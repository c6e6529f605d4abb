"""What the engine knows of other ranks: which run of a chunk is its own, and whom to ask for the rest.

Homes, tiles, gradients at home and optimizer state are those of the shard that this rank owns; compute memory holds
whole chunks. How shards are cut and how bytes reach other ranks is for an implementation of `ShardGroup` to know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

from gemini.offload.memory_file import MemoryFile
from gemini.offload.transfer import Move

__all__ = [
    "ChunkShard",
    "Collective",
    "RankAxis",
    "RankGrid",
    "ShardGroup",
    "Sharding",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkShard:
    """The run of a chunk's elements that one rank owns, once the chunk is padded so that all ranks' are equal."""

    rank: int
    num_ranks: int
    numel: int
    """Elements of each rank's shard, more than 0."""

    @property
    def begin(self) -> int:
        """First element, in the padded chunk; may lie beyond the chunk itself."""
        return self.rank * self.numel

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.begin + self.numel

    @property
    def whole_numel(self) -> int:
        """Elements of the padded chunk."""
        return self.num_ranks * self.numel

    def of_rank(self, rank: int) -> ChunkShard:
        """Return another rank's shard of the same chunk."""
        return dataclasses.replace(self, rank=rank)


class RankAxis(Enum):
    """A direction in the grid of ranks: those that differ from this one in that direction alone."""

    SHARD = "shard"
    """Ranks that hold one replica of the model together, each a shard of every chunk."""
    REPLICA = "replica"
    """Ranks that hold the same shard."""
    TENSOR = "tensor"
    """Ranks that hold other parts of each parameter, or copies; they are given the same batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGrid:
    """How the ranks are arranged, and where this one is."""

    num_shards: int
    num_replicas: int = 1
    replica: int = 0
    """This rank's, from 0."""
    num_tensor_ranks: int = 1
    """Ranks among which parameters are divided before they are laid out in chunks."""
    tensor_rank: int = 0
    """This rank's place among them, from 0."""

    @property
    def num_batches(self) -> int:
        """Parts of the global batch, over which gradients are averaged."""
        return self.num_replicas * self.num_shards


class Collective(Protocol):
    """An operation of several ranks under way."""

    def wait(self) -> None:
        """Make compute submitted from now on see the result; blocks where compute is the host itself.

        Raises:
            CollectiveError: a rank has died, stalled or gone another way.
        """


class ShardGroup(Protocol):
    """The ranks that share one model. All of them call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """This process's number among all processes, from 0; for messages and names of files."""
        ...

    @property
    def grid(self) -> RankGrid:
        """How the ranks are arranged."""
        ...

    @property
    def ranks(self) -> Sequence[int]:
        """The numbers of all ranks that share the model, in the order of the rows of `gather_values`."""
        ...

    def shard_of(self, numel: int, itemsize: int) -> ChunkShard | None:
        """Return this rank's shard of a chunk, None if chunks are not cut.

        Args:
            numel: elements of the chunk.
            itemsize: bytes that each takes as a working weight.

        Returns:
            The shard.
        """

    def all_gather(
        self, whole: torch.Tensor, *, name: str, axis: RankAxis = RankAxis.SHARD, after: Sequence[Move] = ()
    ) -> Collective:
        """Start filling a buffer with the parts of all ranks of an axis.

        Args:
            whole: uint8 [num_ranks * n] in compute memory; holds this rank's n bytes in their place, the rest is
                overwritten. Untouched by others until the result has been waited for.
            name: what is gathered, for messages.
            axis: among which ranks.
            after: copies into `whole` under way.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """

    def exchange(
        self, sent: torch.Tensor, received: torch.Tensor, *, name: str, axis: RankAxis = RankAxis.SHARD
    ) -> Collective:
        """Start sending each rank of an axis its part of a buffer, and receiving this rank's part of everyone's.

        Args:
            sent: uint8 [num_ranks * n] in compute memory, the parts in rank order; unchanged until the result has been
                waited for.
            received: as many bytes; overwritten, in rank order.
            name: what is exchanged, for messages.
            axis: among which ranks.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """

    def gather_values(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return everyone's values; blocks until all ranks have called.

        It also makes sure that all ranks have asked for the same operations since the last time.

        Args:
            values: [n] on the CPU, of any dtype; of the same length everywhere.
            name: what is gathered, for messages.

        Returns:
            [num_tensor_ranks * num_replicas * num_shards, n] on the CPU, the same bits on every rank.

        Raises:
            CollectiveError: a rank has died, stalled or gone another way.
        """

    def gather_along(self, axes: Sequence[RankAxis], values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return the values of the ranks along some axes only; else as `gather_values`.

        Args:
            axes: which; the same on all ranks.
            values: [n] on the CPU, of any dtype; of the same length everywhere.
            name: what is gathered, for messages.

        Returns:
            [num_ranks, n] on the CPU; along the first axis rows follow one another.

        Raises:
            CollectiveError: a rank has died, stalled or gone another way.
        """

    def check(self) -> None:
        """Raise CollectiveError if an operation has failed: ranks may have gone different ways since."""

    def close(self) -> None:
        """Give up what belongs to this group alone; waits for no other rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """With whom a model is shared, and how much of it."""

    group: ShardGroup
    node_ranks: tuple[int, ...]
    """The ranks on this machine, this one among them, in the order of `group.ranks`."""
    stage: int
    """1: the optimizer's state is sharded; 2: and gradients; 3: and working weights."""
    frozen_file: MemoryFile | None = None
    """Holds the frozen weights that live in host memory, whole, for all of the ranks on this machine; None: each rank
    keeps its shards of them. The ranks must meet between construction, when one of them fills it, and the first use."""
    is_alone: bool = False
    """Whether chunks are not cut and nothing is exchanged, because this rank has the model to itself."""

    @property
    def keeps_whole_weights(self) -> bool:
        """Whether compute memory always holds all weights."""
        return self.stage < 3

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether compute memory holds all of this rank's gradients until the step."""
        return self.stage < 2
