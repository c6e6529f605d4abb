"""Ranks load what they keep of a checkpoint, and save it together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from directories import outputs, plain_model, rewrite, tensors_in
from model_zoo import HF_CASES
from rank_pool import RankPool
from rank_weights import (
    load_and_save,
    load_apart,
    own_model,
    prompted_model,
    save_by_themselves,
    save_to_a_full_drive,
)
from training_harness import same_bits

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("name", "stage", "on_disk", "frozen"),
    [
        ("gpt2", 3, False, False),
        ("gpt2", 3, False, True),  # in memory that the ranks share
        ("gpt2", 1, True, False),
        ("mixtral", 3, True, False),
    ],
)
def test_two_ranks_load_and_save_what_one_process_does(
    name: str, stage: int, on_disk: bool, frozen: bool, ranks: RankPool, tmp_path: Path
) -> None:
    model = plain_model(name)
    model.save_pretrained(tmp_path / "stored")

    results = ranks.run(
        2,
        load_and_save,
        name=name,
        stored=tmp_path / "stored",
        saved=tmp_path / "saved",
        stage=stage,
        swap=tmp_path if on_disk else None,
        frozen=frozen,
    )

    for result in results:
        assert result["report"].missing_keys == ()
        assert same_bits(result["weights"], model.state_dict())
        assert torch.equal(result["output"], outputs(model, HF_CASES[name])[0])
    assert same_bits(tensors_in(tmp_path / "saved"), tensors_in(tmp_path / "stored"))


@pytest.mark.parametrize("build", [own_model, prompted_model])
def test_models_that_save_themselves_do_so_for_all_ranks(
    build: Callable[[], Any], ranks: RankPool, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "plain")
    (tmp_path / "swap").mkdir()
    ranks.run(2, save_by_themselves, build=build, saved=tmp_path / "ours", swap=tmp_path / "swap")
    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("ours", "plain")]
    assert names[0] >= names[1]


def test_a_drive_that_is_full_is_noticed_by_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    plain_model("gpt2").save_pretrained(tmp_path / "stored")

    first, second = ranks.run(2, save_to_a_full_drive, stored=tmp_path / "stored", saved=tmp_path / "saved")

    assert first[0] == "OffloadIOError"
    assert "model.safetensors: File too large" in first[1]
    assert second == ("CheckpointError", "the checkpoint has failed on rank 0; see the error there")
    assert same_bits(tensors_in(tmp_path / "saved"), tensors_in(tmp_path / "stored"))


@pytest.mark.slow
def test_ranks_that_see_different_weights_load_nothing(ranks: RankPool, tmp_path: Path) -> None:
    for rank in range(2):
        plain_model("gpt2").save_pretrained(tmp_path / str(rank))
    rewrite(tmp_path / "1", lambda tensors: tensors["transformer.ln_f.bias"].add_(1e-7))

    expected = "ranks were given different checkpoints to load; nothing was loaded: give all ranks the same"
    assert ranks.run(2, load_apart, directory=tmp_path) == [("CheckpointMismatchError", expected)] * 2

    (tmp_path / "1" / "model.safetensors").unlink()
    first, second = ranks.run(2, load_apart, directory=tmp_path)
    assert first == (
        "CheckpointMismatchError",
        "rank 1 cannot load its values and reports the reason; nothing was loaded",
    )
    assert second[0] == "MissingCheckpointError"
