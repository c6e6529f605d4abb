"""What is fetched ahead of its use follows the order of the last step of the same kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gemini.placement.tracer import Phase, UseTrace
from gemini.runtime.lookahead import Lookahead

STEP = (0, 1, 2, 3, 2, 1)  # forward, and back


class Core:
    """Chunks in so many slots; notes what is asked of it."""

    def __init__(self, num_chunks: int, num_slots: int, *, residents: tuple[int, ...] = (), is_sharded: bool = False):
        shard = object() if is_sharded else None
        self.chunks = [
            SimpleNamespace(name=f"chunk{i}", is_resident=i in residents, shard=shard) for i in range(num_chunks)
        ]
        self.num_slots = num_slots
        self.here: dict[int, None] = {}
        self.calls: list[tuple[str, int]] = []
        self.refused: set[int] = set()

    def poll(self) -> None:
        pass

    @property
    def slots(self) -> Core:
        return self

    def chunk_ids(self) -> set[int]:
        return set(self.here)

    def num_free(self) -> int:
        return self.num_slots - len(self.here)

    def evictable(self) -> set[int]:
        return set(self.here)

    def can_prefetch(self, chunk_id: int) -> bool:
        return chunk_id not in self.refused

    def prefetch(self, chunk_id: int) -> None:
        self.calls.append(("prefetch", chunk_id))
        if not self.chunks[chunk_id].is_resident:
            self.here[chunk_id] = None

    def evict(self, chunk_id: int) -> None:
        self.calls.append(("evict", chunk_id))
        del self.here[chunk_id]

    def begin_gather(self, chunk_id: int) -> None:
        self.calls.append(("gather", chunk_id))

    def use(self, lookahead: Lookahead, chunk_id: int) -> list[tuple[str, int]]:
        """Use a chunk as a unit does; return what was asked for ahead."""
        if chunk_id not in self.here and not self.chunks[chunk_id].is_resident:
            while not self.num_free():
                del self.here[next(iter(self.here))]
            self.here[chunk_id] = None
        lookahead.record(chunk_id)
        self.calls.clear()
        lookahead.fetch_ahead()
        return list(self.calls)


def make(core: Any, *, depth: int = 1, is_sharded: bool = False) -> Lookahead:
    return Lookahead(core, UseTrace(), depth=depth, num_slots=core.num_slots, is_sharded=is_sharded)


def run_step(lookahead: Lookahead, core: Core, uses: tuple[int, ...] = STEP) -> list[list[tuple[str, int]]]:
    lookahead.begin_forward(Phase.TRAIN)
    calls = [core.use(lookahead, chunk_id) for chunk_id in uses]
    lookahead.end_forward()
    lookahead.end_step()
    return calls


def test_the_first_step_fetches_nothing_ahead_and_the_second_what_comes_next() -> None:
    core = Core(4, 2)
    lookahead = make(core)
    assert run_step(lookahead, core) == [[]] * len(STEP)
    calls = run_step(lookahead, core)
    assert [chunk_id for each in calls for name, chunk_id in each if name == "prefetch"] == [
        2,
        3,
        1,
        0,
    ]  # 1 and, on the way back, 2 are still there
    assert lookahead.num_mismatches == 0


def test_with_depth_0_nothing_is_fetched_ahead() -> None:
    core = Core(4, 2)
    lookahead = make(core, depth=0)
    run_step(lookahead, core)
    assert run_step(lookahead, core) == [[]] * len(STEP)


def test_a_fetch_that_would_wait_ends_the_round() -> None:
    core = Core(4, 4)
    lookahead = make(core, depth=3)
    run_step(lookahead, core)
    core.here.clear()
    core.refused = {2}
    lookahead.begin_forward(Phase.TRAIN)
    assert core.use(lookahead, 0) == [("prefetch", 1)]


def test_chunks_that_never_move_are_not_in_the_trace() -> None:
    core = Core(4, 2, residents=(1,))
    lookahead = make(core)
    run_step(lookahead, core)
    assert lookahead.state_dict() == {"train": ["chunk0", "chunk2", "chunk3", "chunk2"]}
    assert [lookahead.distance(chunk_id) for chunk_id in range(4)] == [0, 1, 2, 3]  # but the next forward needs them


def test_a_forward_without_gradients_is_a_step_of_its_own() -> None:
    core = Core(4, 2)
    lookahead = make(core)
    run_step(lookahead, core)
    lookahead.begin_forward(Phase.INFERENCE)
    for chunk_id in (0, 1, 2, 3):
        core.use(lookahead, chunk_id)
    lookahead.end_forward()
    assert lookahead.state_dict() == {
        "train": [f"chunk{i}" for i in STEP],
        "inference": ["chunk0", "chunk1", "chunk2", "chunk3"],
    }
    assert lookahead.num_mismatches == 0


def test_a_second_forward_goes_on_with_the_step() -> None:
    core = Core(4, 2)
    lookahead = make(core)
    for _ in range(2):
        lookahead.begin_forward(Phase.TRAIN)
        core.use(lookahead, 0)
        lookahead.end_forward()
    lookahead.end_step()
    assert lookahead.state_dict() == {"train": ["chunk0", "chunk0"]}


@pytest.mark.parametrize(("names", "is_followed"), [(["chunk2", "chunk0"], True), (["chunk2", "elsewhere"], False)])
def test_an_order_is_taken_over_if_all_of_its_chunks_are_here(names: list[str], is_followed: bool) -> None:
    core = Core(4, 2)
    lookahead = make(core)
    lookahead.load_state_dict({"train": names})
    assert lookahead.state_dict() == ({"train": names} if is_followed else {})
    assert lookahead.needed_soon(1) == ((2,) if is_followed else ())
    assert lookahead.distance(0) == (1 if is_followed else -1)


def test_ranks_gather_nothing_before_the_step_that_changes_it() -> None:
    core = Core(4, 4, is_sharded=True)
    lookahead = make(core, depth=2, is_sharded=True)
    run_step(lookahead, core)
    lookahead.begin_forward(Phase.TRAIN)
    last = [core.use(lookahead, chunk_id) for chunk_id in STEP][-1]
    assert last == []  # what the next step begins with must be gathered after the update
    lookahead.end_step()
    core.calls.clear()
    lookahead.fetch_ahead()
    assert ("gather", 0) in core.calls
