"""What fails on one rank while a checkpoint is saved or loaded is raised on all of them, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_pool import RankPool
from rank_saves import load_apart, save_and_damage, save_apart, save_with_fault
from training_harness import same_bits

pytestmark = pytest.mark.processes


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_rank_whose_drive_is_full_lets_all_ranks_go_on(
    failing_rank: int, wait: bool, ranks: RankPool, tmp_path: Path
) -> None:
    results = ranks.run(
        2, save_with_fault, directory=tmp_path / "run", fault="full", failing_rank=failing_rank, wait=wait
    )

    for rank, result in enumerate(results):
        type_name, message = result["saved" if wait else "stepped"]
        if rank == failing_rank:
            assert type_name == "OffloadIOError"
            assert f"rank-0000{rank}.safetensors: File too large" in message
        else:
            assert (type_name, message) == (
                "CheckpointError",
                f"the checkpoint has failed on rank {failing_rank}; see the error there",
            )
        assert result["stepped" if wait else "saved"] == ("", "")
        assert result["left"] == []
        assert same_bits(result["weights"], result["expected"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000002-save-00001"]


@pytest.mark.slow
def test_what_the_first_rank_cannot_keep_is_refused_on_all(ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(2, save_with_fault, directory=tmp_path / "run", fault="extra", failing_rank=0, wait=False)

    assert [result["saved"][0] for result in results] == ["ConfigError", "CheckpointError"]
    assert all(result["stepped"] == ("", "") for result in results)


@pytest.mark.parametrize("damaged", ["rank-00000.safetensors", "rank-00001.safetensors", "rank-00001.pt"])
def test_a_file_that_one_rank_finds_damaged_is_refused_by_all(damaged: str, ranks: RankPool, tmp_path: Path) -> None:
    results = ranks.run(2, save_and_damage, directory=tmp_path, damaged=damaged)

    finder = int(damaged[9])
    assert f"{damaged} is damaged" in results[finder]["loaded"][1]
    assert results[1 - finder]["loaded"][1] == f"the checkpoint has failed on rank {finder}; see the error there"
    assert all(same_bits(result["after"], result["before"]) for result in results)


def test_ranks_that_see_different_checkpoints_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    for type_name, message in ranks.run(2, load_apart, directory=tmp_path):
        assert type_name == "CheckpointError"
        assert "rank 0 and rank 1 see different checkpoints; give all ranks the same shared directory" in message


def test_ranks_that_save_into_different_directories_complete_nothing(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, save_apart, directory=tmp_path)

    assert first[0] == second[0] == "CheckpointError"
    assert "rank-00001.safetensors is missing from the checkpoint; give all ranks the same shared directory" in first[1]
    assert list((tmp_path / "0").iterdir()) == []
