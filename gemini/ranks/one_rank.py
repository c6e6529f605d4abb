"""The group of an engine with a single rank: every exchange is with itself and is done at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemini.offload.arena import MemorySource
from gemini.offload.home import HomeReaders
from gemini.offload.transfer import Move
from gemini.ranks.sharding import ChunkShard, RankAxis, RankGrid, Sharding

__all__ = ["ALONE", "PRIVATE_HOMES", "OneRank"]


class Done:
    """A collective that is complete from the start; see Collective."""

    def wait(self) -> None:
        """Return at once."""


class OneRank:
    """A group of one rank with the methods of ShardGroup. It has no state, so all engines may share one."""

    rank = 0
    grid = RankGrid(num_shards=1)
    ranks: Sequence[int] = (0,)

    def shard_of(self, numel: int, itemsize: int) -> ChunkShard | None:
        """Return None: the chunk is not cut."""
        return None

    def all_gather(
        self, whole: torch.Tensor, *, name: str, axis: RankAxis = RankAxis.SHARD, after: Sequence[Move] = ()
    ) -> Done:
        """Leave the buffer as it is: the only part of it is in its place."""
        return Done()

    def exchange(
        self, sent: torch.Tensor, received: torch.Tensor, *, name: str, axis: RankAxis = RankAxis.SHARD
    ) -> Done:
        """Copy what is sent to what is received."""
        received.copy_(sent)
        return Done()

    def gather_values(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return the values as the only row, [1, n]."""
        return values.unsqueeze(0)

    def gather_along(self, axes: Sequence[RankAxis], values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return the values as the only row, [1, n]."""
        return values.unsqueeze(0)

    def check(self) -> None:
        """Return: nothing that could fail is under way."""

    def close(self) -> None:
        """Return: nothing is held."""


class PrivateHomes:
    """Homes that nobody else reads; see SharedHomes, whose methods these are."""

    def has(self, chunk_id: int) -> bool:
        """Return False."""
        return False

    def claim(self, chunk_id: int, nbytes: int) -> MemorySource:
        """Never called: no home is shared."""
        raise AssertionError("no home is shared")

    def readers_of(self, chunk_id: int) -> HomeReaders:
        """Never called: no home is shared."""
        raise AssertionError("no home is shared")

    def gather(self, chunk_id: int, whole: torch.Tensor, *, name: str) -> Done:
        """Never called: no home is shared."""
        raise AssertionError("no home is shared")

    def close(self) -> None:
        """Return: nothing is held."""


PRIVATE_HOMES = PrivateHomes()
"""The homes of an engine whose ranks, if any, ask each other for weights."""
ALONE = Sharding(group=OneRank(), node_ranks=(0,), stage=3, is_alone=True)
"""The sharding of an engine that has its model to itself."""
