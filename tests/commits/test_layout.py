"""How long a commit file is, is known before anything is taken, and is what is taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from committed_runs import DISK_MIXTURES, Scenario, attached, memory_file, scenarios

from gemini import GeminiDDP
from gemini.assembly.blueprint import draw_blueprint
from gemini.commits.file import CommitFile
from gemini.commits.layout import lay_out_overhead
from gemini.commits.record import CommittedStep, decode_record, encode_record
from gemini.kernels.adam_tile import AdamHyper, AdamSegment
from gemini.placement.plan import ChunkDemand
from gemini.tiers import MemoryTier
from gemini.update.job import PlannedUpdate

PLACES = {
    "memory": Scenario(),
    "disk": Scenario("nvme"),
    **{name: Scenario("nvme", config={"placement": placement}) for name, placement in DISK_MIXTURES.items()},
}


@pytest.mark.parametrize("place", PLACES)
def test_the_file_is_as_long_as_what_is_taken_of_it(place: str, tmp_path: Path) -> None:
    scenario = PLACES[place]
    with memory_file(scenario, tmp_path) as descriptor:
        file = CommitFile.open(descriptor)
        blueprint = draw_blueprint(scenario.build(0), scenario.configuration(tmp_path), has_commits=True)
        with GeminiDDP(scenario.build(0), scenario.configuration(tmp_path), commits=file) as engine:
            assert blueprint.commits is not None
            assert file._taken_nbytes == blueprint.commits.buffer_nbytes
            ledger = engine.runtime.resources.ledger
            assert ledger.by_purpose(MemoryTier.HOST) == engine.runtime.demand.by_purpose[MemoryTier.HOST]
            assert ledger.by_purpose(MemoryTier.HOST)["commits"] == 4 << 20
        assert os.fstat(descriptor).st_size == blueprint.commits.nbytes


def test_a_device_with_room_holds_copies_of_what_is_committed(tmp_path: Path) -> None:
    scenario = scenarios()["device-holds-all"]
    blueprint = draw_blueprint(scenario.build(0), scenario.configuration(tmp_path), has_commits=True)
    for homes in blueprint.plan.chunks:
        assert homes.is_resident
        assert {*homes.working, *homes.state, homes.grad} == {MemoryTier.HOST}


def test_the_overhead_follows_the_formula() -> None:
    demand = ChunkDemand(
        chunk_id=0, numel=1_000_000, working_itemsize=2, master_itemsize=2, is_trainable=True, is_pinned=False
    )
    layout = lay_out_overhead([demand], tile_numel=4096, num_params=10, model_buffer_nbytes=5000, num_scratches=4)
    assert layout.record_nbytes == 1_069_056  # 2^20 + 10 * 1024 + 2 * 5000, whole pages
    assert layout.num_blocks == 977
    assert layout.num_words == 245
    assert layout.overhead_nbytes == 4096 + 2 * 1_069_056 + 4096 + 4096 + 4 * 16384
    assert layout.buffers == layout.nbytes == 4 << 20


def test_a_record_comes_back_exactly() -> None:
    hyper = AdamHyper(lr=0.1 + 0.2, beta1=0.9, beta2=0.999, eps=1e-300, weight_decay=1 / 3, is_decoupled=False)
    segments = tuple(AdamSegment(begin=b, end=b + 5, hyper=hyper, step=b + 1) for b in (0, 7))
    step = CommittedStep(
        num_steps=3, planned={4: PlannedUpdate(segments, 1 / 7), 0: PlannedUpdate((), 2.0)}, run_state=b"a\nb"
    )
    assert decode_record(encode_record(step)) == step


def test_the_file_lies_at_a_huge_page(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with memory_file(scenario, tmp_path) as descriptor, attached(scenario, tmp_path, descriptor) as training:
        file = training.engine.runtime.commits.file
        assert file is not None
        assert file._memory is not None
        assert file._memory.data_ptr() % (2 << 20) == 0
