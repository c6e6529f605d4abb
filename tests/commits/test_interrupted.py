"""Updates that ended at a certain point, in each placement, are finished bit by bit; faults of the file are named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from committed_runs import DISK_MIXTURES, Scenario, attached, commit_nbytes, memory_file, uninterrupted
from interruptions import EndInBlock, EndInWrites, commit_and_end, step_to_commit
from patience import wait_until
from training_harness import Run

from gemini import GeminiDDP
from gemini.commits.file import CommitFile, CommitLayout
from gemini.commits.journal import TileStage
from gemini.errors import CheckpointError, CheckpointMismatchError, ConfigError, ModelError, OffloadIOError
from gemini.kernels.journal import JournalStop

NUM_STEPS = 4
TILE = {"tile_numel": 8192, "overlap": "next-forward"}
PLACES = {
    "memory": Scenario(model="wide", config=TILE),
    "disk": Scenario("nvme", "wide", config=TILE),
    "state on disk": Scenario("nvme", "wide", config={**TILE, "placement": DISK_MIXTURES["state"]}),
    "weights on disk": Scenario("nvme", "wide", config={**TILE, "placement": DISK_MIXTURES["weights"]}),
    "gradients on disk": Scenario("nvme", "wide", config={**TILE, "placement": DISK_MIXTURES["gradients"]}),
    "half precision": Scenario(
        "nvme", "gpt2", config={**TILE, "dtype": torch.bfloat16, "placement": DISK_MIXTURES["state"]}
    ),
}


def assert_same(found: Run, expected: Run) -> None:
    assert found.losses == expected.losses
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def finish(scenario: Scenario, directory: Path, descriptor: int) -> Run:
    with attached(scenario, directory, descriptor, seed=7) as training:
        assert training.step == NUM_STEPS - 1
        training.train(NUM_STEPS)
        return training.run


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("num_tiles", [0, 2])
@pytest.mark.parametrize("stop", JournalStop)
@pytest.mark.parametrize("place", [place for place in PLACES if place != "disk"])
def test_an_update_that_ended_in_a_block_is_finished(
    place: str, stop: JournalStop, num_tiles: int, tmp_path: Path
) -> None:
    scenario, fault = PLACES[place], EndInBlock(stop, num_tiles=num_tiles)
    with memory_file(scenario, tmp_path) as descriptor:
        with step_to_commit(scenario, tmp_path, descriptor, NUM_STEPS - 1) as training:
            commit_and_end(training, fault)
        assert fault.has_ended
        found = finish(scenario, tmp_path, descriptor)
    assert_same(found, uninterrupted(scenario, tmp_path, NUM_STEPS))


@pytest.mark.parametrize("place", ["disk", "state on disk", "weights on disk", "half precision"])
def test_writes_that_ended_half_way_are_done_again(place: str, tmp_path: Path) -> None:
    scenario, fault = PLACES[place], EndInWrites()
    with memory_file(scenario, tmp_path) as descriptor:
        with step_to_commit(scenario, tmp_path, descriptor, NUM_STEPS - 1) as training:
            commit_and_end(training, fault)
        assert fault.torn
        found = finish(scenario, tmp_path, descriptor)
    assert_same(found, uninterrupted(scenario, tmp_path, NUM_STEPS))


def test_a_tile_on_disk_says_how_far_it_is(tmp_path: Path) -> None:
    scenario, fault = PLACES["disk"], EndInWrites()
    with (
        memory_file(scenario, tmp_path) as descriptor,
        step_to_commit(scenario, tmp_path, descriptor, NUM_STEPS - 1) as training,
    ):
        journal = training.engine.runtime.commits.log
        chunk_id = min(training.engine.runtime.states)

        def stage_of(chunk_id: int, tile: int) -> tuple[int, TileStage]:
            note = journal.find(chunk_id, tile)
            assert note is not None
            return note.sequence, note.stage

        wait_until(lambda: stage_of(chunk_id, 0) == (NUM_STEPS - 2, TileStage.WRITTEN))
        commit_and_end(training, fault)
        assert (chunk_id, 0) in fault.torn
        assert {stage_of(*tile) for tile in fault.torn} == {(NUM_STEPS - 1, TileStage.UPDATED)}


# ---------------------------------------------------------------- misuse and faults


def test_a_forward_before_the_commit_is_refused(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with memory_file(scenario, tmp_path) as descriptor, attached(scenario, tmp_path, descriptor) as training:
        training.train(1, commits=False)
        with pytest.raises(ModelError, match=r"call engine\.commit\(\.\.\.\) after every optimizer\.step\(\)"):
            training.train(2)
        with pytest.raises(ModelError, match="wait to be committed"):
            training.engine.master_state_dict()
        training.commit()
        training.train(2)


def test_a_commit_in_the_middle_of_a_step_is_refused(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with memory_file(scenario, tmp_path) as descriptor, attached(scenario, tmp_path, descriptor) as training:
        case = scenario.case
        case.loss(training.engine(**case.batches(1)[0])).backward()
        with pytest.raises(ConfigError, match="gradients wait for a step and would be lost"):
            training.commit()


def test_what_cannot_be_kept_leaves_the_step_to_be_committed_again(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with memory_file(scenario, tmp_path) as descriptor:
        with attached(scenario, tmp_path, descriptor) as training:
            training.train(1, commits=False)
            with pytest.raises(ConfigError, match=r"engine\.commit: extra\['model'\]: expected tensors"):
                training.engine.commit(extra={"model": training.engine})
            with pytest.raises(ConfigError, match=r"the record takes \d+ bytes.*store less in extra"):
                training.engine.commit(extra=torch.zeros(1 << 20))
            training.commit()
        with attached(scenario, tmp_path, descriptor) as training:
            assert training.engine.recovered == 1


def test_an_engine_without_a_file_cannot_commit(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with GeminiDDP(scenario.build(0), scenario.configuration(tmp_path)) as engine:
        with pytest.raises(ConfigError, match="has no commit file"):
            engine.commit()
        with pytest.raises(ConfigError, match="held no committed step"):
            engine.recover()
        assert engine.recovered is None


def test_constructing_leaves_random_numbers_alone_and_recovering_restores_them(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with memory_file(scenario, tmp_path) as descriptor:
        with attached(scenario, tmp_path, descriptor) as training:
            training.train(1)
            expected = torch.rand(3)
        torch.manual_seed(5)
        with attached(scenario, tmp_path, descriptor):
            assert torch.equal(torch.rand(3), expected)


def test_loading_other_weights_takes_the_commit_back(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with memory_file(scenario, tmp_path) as descriptor:
        with attached(scenario, tmp_path, descriptor) as training:
            training.train(2)
            training.engine.load_state_dict(training.engine.state_dict())
        with attached(scenario, tmp_path, descriptor) as training:
            assert training.step == 0
            training.train(2)
        with attached(scenario, tmp_path, descriptor) as training:
            assert training.step == 2
            found = training.run
    assert_same(found, uninterrupted(scenario, tmp_path, 2))


def test_two_processes_cannot_have_one_file(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    with (
        memory_file(scenario, tmp_path) as descriptor,
        attached(scenario, tmp_path, descriptor),
        pytest.raises(ConfigError, match="in use by another process"),
    ):
        CommitFile.open(descriptor)


def test_another_engines_state_is_refused(tmp_path: Path) -> None:
    with memory_file(PLACES["memory"], tmp_path) as descriptor:
        with attached(PLACES["memory"], tmp_path, descriptor) as training:
            training.train(1)
        other = Scenario(model="tower", config=TILE)
        with pytest.raises(
            CheckpointMismatchError, match=r"holds the state of another engine: 1050112 trained .*this one is: "
        ):
            attached(other, tmp_path, descriptor).__enter__()
        with attached(PLACES["memory"], tmp_path, descriptor) as training:
            assert training.step == 1


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    scenario = PLACES["memory"]
    nbytes = commit_nbytes(scenario, tmp_path)
    descriptor = os.memfd_create("short")
    CommitFile.create(descriptor, nbytes - 4096).close()
    with pytest.raises(ConfigError, match=f"has {nbytes - 4096} bytes, this engine needs {nbytes}"):
        attached(scenario, tmp_path, descriptor).__enter__()
    os.close(descriptor)


def test_a_file_that_was_cut_is_refused() -> None:
    descriptor = os.memfd_create("cut")
    CommitFile.create(descriptor, 8192).close()
    os.ftruncate(descriptor, 4096)
    with pytest.raises(CheckpointError, match="expected a commit file of 8192 bytes"):
        CommitFile.open(descriptor)
    os.ftruncate(descriptor, 0)
    with pytest.raises(CheckpointError, match="expected a commit file with its magic"):
        CommitFile.open(descriptor)
    os.close(descriptor)


def test_a_swap_file_of_another_state_is_refused(tmp_path: Path) -> None:
    scenario = PLACES["disk"]
    with memory_file(scenario, tmp_path) as first, memory_file(scenario, tmp_path) as second:
        with attached(scenario, tmp_path, first) as training:
            training.train(1)
        assert (tmp_path / "gemini-rank0.kept").exists()
        with attached(scenario, tmp_path, second) as training:
            training.train(1)
        with pytest.raises(
            CheckpointMismatchError, match=r"expected the swap file of the committed state, identity 0x"
        ):
            attached(scenario, tmp_path, first).__enter__()


def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    scenario = PLACES["disk"]
    (tmp_path / "gemini-rank0.kept").write_bytes(b"letters")
    with memory_file(scenario, tmp_path) as descriptor, pytest.raises(OffloadIOError, match="is not a kept swap file"):
        attached(scenario, tmp_path, descriptor).__enter__()
    assert (tmp_path / "gemini-rank0.kept").read_bytes() == b"letters"


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (Scenario("resident"), "is trainable and at home on the device"),
        (Scenario("nvme", config={"overlap": "speculative"}), '"speculative" updates state before a step'),
    ],
)
def test_what_cannot_be_committed_is_refused(scenario: Scenario, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        commit_nbytes(scenario, tmp_path)


# ---------------------------------------------------------------- records

LAYOUT = CommitLayout(record_nbytes=4096, num_blocks=1, num_words=1, num_scratches=1, buffer_nbytes=4096)
"""Places of records at 4096 and 8192."""


@contextmanager
def small_file() -> Iterator[int]:
    descriptor = os.memfd_create("small")
    CommitFile.create(descriptor, LAYOUT.nbytes).close()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def reread(descriptor: int) -> tuple[int, bytes] | None:
    with CommitFile.open(descriptor) as file:
        file.claim(LAYOUT, fingerprint="f", text="a test")
        record = file.resume(file.sequence)
        return None if record is None else (record.sequence, record.content)


def publish(descriptor: int, *contents: bytes) -> None:
    with CommitFile.open(descriptor) as file:
        file.claim(LAYOUT, fingerprint="f", text="a test")
        for content in contents:
            file.publish(content)


def test_records_alternate_and_the_newest_counts() -> None:
    with small_file() as descriptor:
        assert reread(descriptor) is None
        publish(descriptor, b"one")
        assert reread(descriptor) == (1, b"one")
        publish(descriptor, b"two", b"three")
        assert reread(descriptor) == (3, b"three")
        assert os.pread(descriptor, 8, 8192) == (3).to_bytes(8, "little")
        assert os.pread(descriptor, 3, 4096 + 64) == b"two"


def test_a_record_that_was_not_published_does_not_count() -> None:
    with small_file() as descriptor:
        publish(descriptor, b"one", b"two")
        os.pwrite(descriptor, bytes(8), 4096)
        assert reread(descriptor) == (1, b"one")


@pytest.mark.parametrize("offset", [8, 16, 64])
def test_a_damaged_record_is_refused(offset: int) -> None:
    with small_file() as descriptor:
        publish(descriptor, b"one", b"two")
        os.pwrite(descriptor, b"\xff", 4096 + offset)
        with pytest.raises(CheckpointError, match="the checksum of record 2 is wrong"):
            reread(descriptor)


@pytest.mark.parametrize("fingerprint", ["f", "g"])
def test_a_file_without_a_record_is_cleared(fingerprint: str) -> None:
    with small_file() as descriptor:
        with CommitFile.open(descriptor) as file:
            file.claim(LAYOUT, fingerprint="f", text="a test")
            file.put_word(0, 7)
            file.publish(b"one")
            assert file.words.tolist() == [7]
            file.drop()
            assert not file.has_record
        with CommitFile.open(descriptor) as file:
            file.claim(LAYOUT, fingerprint=fingerprint, text="a test")
            assert file.resume(file.sequence) is None
            assert (file.sequence, file.words.tolist()) == (0, [0])


def test_what_was_published_or_dropped_last_is_withdrawn() -> None:
    with small_file() as descriptor:
        publish(descriptor, b"one", b"two")
        with CommitFile.open(descriptor) as file:
            file.claim(LAYOUT, fingerprint="f", text="a test")
            file.withdraw(1)
            assert (file.sequence, file.has_record) == (1, True)
            file.drop()
            file.withdraw(1)
            assert (file.sequence, file.has_record) == (1, True)
        assert reread(descriptor) == (1, b"one")
