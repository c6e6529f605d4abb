"""Sums over replicas: one set of bits on all of them, whenever each has come by its own sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemini.gradients.replica_sums import ReplicaSums, sum_of_parts
from gemini.ranks.sharding import RankAxis, RankGrid


@dataclass
class Wires:
    """What all replicas have sent so far."""

    calls: list[list[tuple[str, torch.Tensor]]]

    def of_call(self, call: int, kind: str) -> list[torch.Tensor]:
        assert all(calls[call][0] == kind for calls in self.calls)
        return [calls[call][1] for calls in self.calls]


@dataclass
class FakePending:
    wires: Wires
    call: int
    kind: str
    replica: int
    into: torch.Tensor

    def wait(self) -> None:
        parts = self.wires.of_call(self.call, self.kind)
        num_replicas = len(parts)
        if self.kind.startswith("gather"):
            parts = [part.view(num_replicas, -1)[other] for other, part in enumerate(parts)]
        else:
            parts = [part.view(num_replicas, -1)[self.replica] for part in parts]
        self.into.copy_(torch.cat(parts))


@dataclass
class FakeGroup:
    """One replica of a group that lives in one process; a wait fails unless all others have asked for the same."""

    grid: RankGrid
    wires: Wires

    def exchange(self, sent: torch.Tensor, received: torch.Tensor, *, name: str, axis: RankAxis) -> FakePending:
        return self._start(f"exchange {name}", sent, received, axis)

    def all_gather(
        self, whole: torch.Tensor, *, name: str, axis: RankAxis, after: Sequence[object] = ()
    ) -> FakePending:
        return self._start(f"gather {name}", whole, whole, axis)

    def _start(self, kind: str, sent: torch.Tensor, into: torch.Tensor, axis: RankAxis) -> FakePending:
        assert axis is RankAxis.REPLICA
        calls = self.wires.calls[self.grid.replica]
        calls.append((kind, sent.clone()))
        return FakePending(self.wires, len(calls) - 1, kind, self.grid.replica, into)


def make_replicas(num_replicas: int) -> tuple[list[ReplicaSums], list[dict[int, torch.Tensor]]]:
    wires = Wires([[] for _ in range(num_replicas)])
    delivered: list[dict[int, torch.Tensor]] = [{} for _ in range(num_replicas)]
    replicas = []
    for i in range(num_replicas):
        group = FakeGroup(RankGrid(num_shards=1, num_replicas=num_replicas, replica=i), wires)
        replicas.append(ReplicaSums(group))
    return replicas, delivered


@given(num_replicas=st.integers(2, 5), numels=st.lists(st.sampled_from([1, 4, 7, 1024]), min_size=1, max_size=4))
def test_all_replicas_get_the_sum_in_their_order(num_replicas, numels):
    replicas, delivered = make_replicas(num_replicas)
    generator = torch.Generator().manual_seed(0)
    totals = [torch.randn(num_replicas, numel, generator=generator) for numel in numels]
    for chunk_id, parts in enumerate(totals):
        for i, sums in enumerate(replicas):
            sums.add(parts[i].clone(), name=f"chunk {chunk_id}", deliver=partial(delivered[i].__setitem__, chunk_id))
        for sums in replicas:
            sums.advance()
    for _ in range(2):
        for sums in replicas:
            sums.advance()
    for found in delivered:
        assert list(found) == list(range(len(numels)))  # oldest first
        for chunk_id, parts in enumerate(totals):
            assert torch.equal(found[chunk_id], sum_of_parts(parts))


def test_a_sum_that_came_early_starts_no_collective_of_its_own():
    replicas, _ = make_replicas(2)
    early, late = replicas
    early.add(torch.ones(4), name="chunk 0", deliver=torch.numel)
    late.advance()
    late.add(torch.ones(4), name="chunk 0", deliver=torch.numel)
    calls = early._group.wires.calls
    assert calls == [[], []]


def test_abandoned_sums_are_not_delivered():
    replicas, delivered = make_replicas(2)
    for i, sums in enumerate(replicas):
        sums.add(torch.ones(4), name="chunk 0", deliver=partial(delivered[i].__setitem__, 0))
        sums.advance()
        sums.add(torch.ones(4), name="chunk 1", deliver=partial(delivered[i].__setitem__, 1))
    for sums in replicas:
        sums.abandon()
        sums.finish()
    assert delivered == [{}, {}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_added_in_float32(dtype):
    parts = torch.tensor([[256.0], [1.0], [1.0]], dtype=dtype)  # 256 + 1 is 256 in bfloat16
    assert sum_of_parts(parts).tolist() == [258.0]
    assert sum_of_parts(parts).dtype is torch.float32
