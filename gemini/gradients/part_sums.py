"""Sums of all ranks' parts by collectives: each rank sends the others theirs, and adds up what it receives."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemini.gradients.exchange import mean_of_sum
from gemini.gradients.replica_sums import sum_of_parts
from gemini.offload.transfer import Transfers
from gemini.ranks.sharding import Collective, ShardGroup

__all__ = ["CollectiveSums"]


class CollectiveSums:
    """Sums by an all-to-all in compute memory; see PartSums, whose methods these are.

    Args:
        group: the ranks.
        transfers: source of compute memory.
        num_slots: sums at the same time.
        slot_nbytes: bytes of a slot; each takes as many again for what is received.
    """

    are_on_host = False

    def __init__(self, group: ShardGroup, transfers: Transfers, *, num_slots: int, slot_nbytes: int) -> None:
        self.slot_nbytes = slot_nbytes
        self._group = group
        self._transfers = transfers
        self._sent, self._received = (
            [transfers.allocate(slot_nbytes, "exchange slots") for _ in range(num_slots if slot_nbytes else 0)]
            for _ in range(2)
        )

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        """Compute memory in which parts are put together."""
        return self._sent

    def start(self, slot: int, *, numel: int, dtype: torch.dtype, divisor: int | None, name: str) -> _PendingParts:
        """Start an all-to-all; see PartSums.start."""
        num_ranks = self._group.grid.num_shards
        nbytes = num_ranks * numel * dtype.itemsize
        received = self._received[slot][:nbytes]
        under_way = self._group.exchange(self._sent[slot][:nbytes], received, name=name)
        return _PendingParts(under_way, received.view(dtype).view(num_ranks, numel), divisor)

    def close(self) -> None:
        """Give the slots back."""
        for buffer in (*self._sent, *self._received):
            self._transfers.free(buffer, "exchange slots")
        self._sent, self._received = [], []


class _PendingParts:
    """Parts on their way to this rank."""

    def __init__(self, under_way: Collective, parts: torch.Tensor, divisor: int | None) -> None:
        self._under_way = under_way
        self._parts = parts
        self._divisor = divisor

    def wait(self) -> torch.Tensor:
        """Return the sum of what was received; see PendingSum."""
        self._under_way.wait()
        total = sum_of_parts(self._parts)
        return total if self._divisor is None else mean_of_sum(total, self._divisor, self._parts.dtype)
