"""Sums of shards' gradients on their way to being sums over all replicas of the model.

The float32 sum of a shard, or of a piece of it, is cut into as many parts as there are replicas; every replica adds up
one part, in the order of replicas, and all gather the results: `2 (R - 1) / R` of the sum's bytes each way, and the
same bits everywhere.

Collectives start in `advance` and `finish` alone. All ranks call these at the same places of the program, so the order
of collectives is the same on all, whenever sums were added; see [Note: Same exchanges on all ranks] in
gemini.gradients.sharded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass

import torch

from gemini.errors import GeminiError
from gemini.ranks.sharding import Collective, RankAxis, ShardGroup

__all__ = ["ReplicaSums", "sum_of_parts"]


@dataclass(eq=False)
class _Sum:
    """One sum under way."""

    deliver: Callable[[torch.Tensor], None]
    stages: Generator[Collective, None, torch.Tensor]
    pending: Collective | None = None
    """Collective that was started and not waited for; None if there is none."""


class ReplicaSums:
    """Sums under way, oldest first.

    Args:
        group: the ranks.
    """

    def __init__(self, group: ShardGroup) -> None:
        self._group = group
        self._sums: deque[_Sum] = deque()

    def add(self, total: torch.Tensor, *, name: str, deliver: Callable[[torch.Tensor], None]) -> None:
        """Take one replica's sum; nothing starts before the next `advance`.

        Args:
            total: of this rank's shard or a piece of it, float32 [numel]; given away.
            name: what it is, for messages.
            deliver: takes the sum over all replicas, float32 [numel].
        """
        self._sums.append(_Sum(deliver, _stages(self._group, total, name)))

    def advance(self) -> None:
        """Advance every sum by one stage, and deliver those that are complete.

        Raises:
            CollectiveError: a rank did not take part.
        """
        for _ in range(len(self._sums)):
            under_way = self._sums.popleft()
            if under_way.pending is not None:
                pending, under_way.pending = under_way.pending, None
                pending.wait()
            try:
                under_way.pending = next(under_way.stages)
            except StopIteration as end:
                under_way.deliver(end.value)
            else:
                self._sums.append(under_way)

    def finish(self) -> None:
        """Deliver all sums.

        Raises:
            CollectiveError: a rank did not take part.
        """
        while self._sums:
            self.advance()

    def abandon(self) -> None:
        """Wait for running exchanges, even if they fail, and forget all sums."""
        while self._sums:
            pending = self._sums.popleft().pending
            if pending is not None:
                with suppress(GeminiError):
                    pending.wait()


def _stages(group: ShardGroup, total: torch.Tensor, name: str) -> Generator[Collective, None, torch.Tensor]:
    """Yield each collective when it has started; to be resumed when it has ended. Return the sum over replicas."""
    num_replicas = group.grid.num_replicas
    whole = _padded(total, num_replicas)
    received = torch.empty_like(whole)
    yield group.exchange(whole.view(torch.uint8), received.view(torch.uint8), name=name, axis=RankAxis.REPLICA)
    whole.view(num_replicas, -1)[group.grid.replica].copy_(sum_of_parts(received.view(num_replicas, -1)))
    del received
    yield group.all_gather(whole.view(torch.uint8), name=name, axis=RankAxis.REPLICA)
    return whole[: total.numel()]


def _padded(values: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return values, 1D, with zeros at the end so that they can be cut into equal parts."""
    missing = -values.numel() % num_parts
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def sum_of_parts(parts: torch.Tensor) -> torch.Tensor:
    """Return the sum of what several ranks have sent, added in float32 in their order.

    Args:
        parts: [num_ranks, numel], float32, bfloat16 or float16; read only.

    Returns:
        The sum, a new float32 [numel].
    """
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total.add_(part)
    return total
