"""The engine's view of other ranks: the part of a chunk that this rank owns, and the operations that get the rest.

Homes, tiles, gradients at home and optimizer state are those of this rank's shard; compute memory holds whole chunks.
An implementation of `ShardGroup` decides how shards are cut and how bytes reach other ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch

from gemini.offload.arena import MemorySource
from gemini.offload.home import HomeReaders
from gemini.offload.memory_file import MemoryFile
from gemini.offload.resources import Resources
from gemini.offload.transfer import Move

__all__ = [
    "ChunkShard",
    "Collective",
    "HostExchange",
    "HostMemory",
    "PartSums",
    "PendingSum",
    "RankAxis",
    "RankGrid",
    "ShardGroup",
    "SharedHomes",
    "Sharding",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkShard:
    """The run of a chunk's elements that one rank owns; the chunk is padded so that all ranks' runs have one length."""

    rank: int
    num_ranks: int
    numel: int
    """Number of elements in each rank's shard, more than 0."""

    @property
    def begin(self) -> int:
        """First element in the padded chunk; may be beyond the chunk itself."""
        return self.rank * self.numel

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.begin + self.numel

    @property
    def whole_numel(self) -> int:
        """Number of elements in the padded chunk."""
        return self.num_ranks * self.numel

    def of_rank(self, rank: int) -> ChunkShard:
        """Return another rank's shard of the same chunk."""
        return dataclasses.replace(self, rank=rank)


class RankAxis(Enum):
    """A direction in the grid of ranks: the ranks that differ from this one only in that direction."""

    SHARD = "shard"
    """Ranks that together hold one replica of the model, each a shard of every chunk."""
    REPLICA = "replica"
    """Ranks that hold the same shard."""
    TENSOR = "tensor"
    """Ranks that hold other parts of each parameter, or copies; all get the same batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGrid:
    """The grid of ranks and this rank's place in it."""

    num_shards: int
    num_replicas: int = 1
    replica: int = 0
    """Replica of this rank, from 0."""
    num_tensor_ranks: int = 1
    """Number of ranks among which parameters are divided before they are laid out in chunks."""
    tensor_rank: int = 0
    """This rank's place among the tensor ranks, from 0."""

    @property
    def num_batches(self) -> int:
        """Number of parts of the global batch, over which gradients are averaged."""
        return self.num_replicas * self.num_shards


class Collective(Protocol):
    """A running operation of several ranks."""

    def wait(self) -> None:
        """Make compute that is submitted from now on wait for the result; blocks if the host itself computes.

        Raises:
            CollectiveError: a rank has died, stalled or called something else.
        """


class PendingSum(Protocol):
    """A sum of all ranks' parts, on its way."""

    def wait(self) -> torch.Tensor:
        """Return the sum; blocks until it is there and the slot with this rank's parts may be filled again.

        Returns:
            [numel], a new tensor; where compute or host memory is meant, see PartSums.are_on_host.

        Raises:
            CollectiveError: a rank has died, stalled or called something else.
        """


class PartSums(Protocol):
    """Sums over the ranks of the shard axis: each fills a slot with a part for every rank and gets the sum of its own.

    Parts are added in float32 in the order of ranks. All ranks start the same sums in the same order.
    """

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        """Compute memory in which parts are put together, uint8 [slot_nbytes] each."""
        ...

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot; 0 if there are none. The same on all ranks."""
        ...

    @property
    def are_on_host(self) -> bool:
        """Whether sums come to lie in host memory; False: in compute memory."""
        ...

    def start(self, slot: int, *, numel: int, dtype: torch.dtype, divisor: int | None, name: str) -> PendingSum:
        """Start bringing each rank the sum of all ranks' parts for it.

        Args:
            slot: index of the slot that holds this rank's parts, [num_ranks, numel] of `dtype` in rank order; unchanged
                until the sum has been awaited.
            numel: elements of a part.
            dtype: float32, bfloat16 or float16.
            divisor: divides the sum, which is then rounded once to `dtype`; None: the sum is left as it is, in float32.
            name: name of the content, for messages.

        Returns:
            The sum.

        Raises:
            CollectiveError: the group has failed.
        """

    def close(self) -> None:
        """Give the slots back; sums under way have been awaited. Idempotent."""


class SharedHomes(Protocol):
    """Homes of this rank's shards in memory that other ranks read. All ranks have them of the same chunks."""

    def has(self, chunk_id: int) -> bool:
        """Return whether a chunk's home has been claimed."""

    def claim(self, chunk_id: int, nbytes: int) -> MemorySource:
        """Return where the home of a chunk's shard finds its memory, which is then taken at once.

        Args:
            chunk_id: the chunk; all ranks claim the same chunks in the same order.
            nbytes: bytes of the home, in whole pages; the same on all ranks.

        Returns:
            The source.
        """

    def readers_of(self, chunk_id: int) -> HomeReaders:
        """Return those who read a chunk's home, to be awaited before it changes."""

    def gather(self, chunk_id: int, whole: torch.Tensor, *, name: str) -> Collective:
        """Start copying the other ranks' shards of a chunk from their homes; this rank's home may be read from here on.

        Args:
            chunk_id: the chunk.
            whole: uint8 [num_ranks * n] in compute memory; all but this rank's n bytes is overwritten. It must not be
                used until the result has been awaited.
            name: name of the content, for messages.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """

    def close(self) -> None:
        """Let go of the other ranks' homes; what was gathered has been awaited. Idempotent."""


class HostExchange(NamedTuple):
    """What one engine has in host memory that ranks of a machine share."""

    sums: PartSums
    homes: SharedHomes


class HostMemory(Protocol):
    """Host memory of one machine that its ranks share, in which their gradients meet and their weights live."""

    def open(self, resources: Resources, *, num_slots: int, slot_nbytes: int, homes_nbytes: int) -> HostExchange:
        """Take this rank's part of that memory, and see the others'.

        Args:
            resources: memory, threads and copy engine; not closed here.
            num_slots: sums at the same time; the same on all ranks.
            slot_nbytes: bytes of a slot, in whole pages; the same on all ranks.
            homes_nbytes: bytes of all homes that will be claimed, in whole pages; the same on all ranks.

        Returns:
            Sums and homes, each closed by who uses it.

        Raises:
            OutOfTierMemoryError: the budgets or the machine do not have the memory.
        """

    def close(self) -> None:
        """Let go of what has been prepared; what was opened remains. Idempotent."""


class ShardGroup(Protocol):
    """The ranks that share one model. All of them call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process among all processes, from 0; for messages and names of files."""
        ...

    @property
    def grid(self) -> RankGrid:
        """The grid of ranks."""
        ...

    @property
    def ranks(self) -> Sequence[int]:
        """Numbers of all ranks that share the model, in the order of the rows of `gather_values`."""
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
                overwritten. It must not be used until the result has been awaited.
            name: name of the content, for messages.
            axis: the ranks that take part.
            after: running copies into `whole`.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """

    def exchange(
        self, sent: torch.Tensor, received: torch.Tensor, *, name: str, axis: RankAxis = RankAxis.SHARD
    ) -> Collective:
        """Start sending each rank of an axis its part of a buffer, and receiving this rank's part from each of them.

        Args:
            sent: uint8 [num_ranks * n] in compute memory, the parts in rank order; unchanged until the result has been
                awaited.
            received: as many bytes; overwritten, in rank order.
            name: name of the content, for messages.
            axis: the ranks that take part.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """

    def gather_values(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return the values of all ranks; blocks until all ranks have called.

        It also checks that all ranks have asked for the same operations since the last call.

        Args:
            values: [n] on the CPU, of any dtype; the same length on all ranks.
            name: name of the content, for messages.

        Returns:
            [num_tensor_ranks * num_replicas * num_shards, n] on the CPU, the same bits on every rank.

        Raises:
            CollectiveError: a rank has died, stalled or called something else.
        """

    def gather_along(self, axes: Sequence[RankAxis], values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return the values of the ranks along some axes; otherwise as `gather_values`.

        Args:
            axes: the axes; the same on all ranks.
            values: [n] on the CPU, of any dtype; the same length on all ranks.
            name: name of the content, for messages.

        Returns:
            [num_ranks, n] on the CPU; along the first axis rows follow one another.

        Raises:
            CollectiveError: a rank has died, stalled or called something else.
        """

    def check(self) -> None:
        """Raise CollectiveError if an operation has failed, after which ranks may have called different operations."""

    def close(self) -> None:
        """Release what belongs to this group alone; does not wait for other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The group that shares a model, and the parts of the model that it shares."""

    group: ShardGroup
    node_ranks: tuple[int, ...]
    """Ranks on this machine, including this one, in the order of `group.ranks`."""
    stage: int
    """Stage: 1 shards the optimizer's state; 2 also gradients; 3 also working weights."""
    frozen_file: MemoryFile | None = None
    """Memory file with the complete frozen weights in host memory, for all ranks on this machine; None if each rank
    keeps its own shards. One rank fills it at construction, and the ranks must meet before the first use."""
    host_memory: HostMemory | None = None
    """Memory in which gradients are added up and weights are read by all; None: the group exchanges both."""
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
