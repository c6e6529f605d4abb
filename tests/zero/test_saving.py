"""Weights and optimizer state leave and enter sharded engines whole, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
from rank_cases import case_of, evaluate_between_steps, keep_buffers, resume_checkpoint, save_and_load, save_checkpoint
from rank_pool import RankPool
from safetensors.torch import load_file
from training_harness import config_for, hybrid_adam, same_bits

from gemini import GeminiDDP
from gemini.checkpoint.directory import complete_checkpoints

pytestmark = pytest.mark.processes


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage", "place"), [(2, 3, "mixed"), (3, 3, "host"), (2, 1, "nvme")])
def test_a_loaded_checkpoint_goes_on_with_the_same_bits(world_size, stage, place, ranks: RankPool, tmp_path):
    directory = None if place == "host" else tmp_path
    for result in ranks.run(world_size, save_and_load, stage=stage, place=place, directory=directory):
        assert same_bits(result["again"], result["through"])
        assert same_bits(result["working"], result["again"])


def test_one_process_loads_what_ranks_have_saved(ranks: RankPool):
    saved = ranks.run(2, save_and_load, stage=3, place="host", directory=None)[0]["saved"]
    with GeminiDDP(case_of("gpt2").model(), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        assert same_bits(engine.master_state_dict(), saved["model"])
        state, expected = optimizer.state_dict()["state"], saved["optimizer"]["state"]
    assert all(torch.equal(state[i][name], expected[i][name]) for i in expected for name in expected[i])


@pytest.mark.parametrize(("stage", "place"), [(3, "device"), (2, "host"), (1, "device")])
def test_evaluation_sees_the_weights_of_the_last_step(stage, place, ranks: RankPool):
    first, second = ranks.run(2, evaluate_between_steps, stage=stage, place=place)
    other, _ = ranks.run(2, evaluate_between_steps, stage=3, place="resident")
    assert first == other
    assert len(second) == len(first)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(("world_size", "stage", "place"), [(2, 3, "mixed"), (3, 3, "host"), (2, 1, "nvme")])
def test_ranks_resume_with_the_same_bits(world_size, stage, place, wait, ranks: RankPool, tmp_path):
    swap = None if place == "host" else tmp_path
    fields = {"stage": stage, "place": place, "directory": tmp_path / "run", "swap": swap}
    saved = ranks.run(world_size, save_checkpoint, wait=wait, **fields)
    for result, fit in zip(ranks.run(world_size, resume_checkpoint, **fields), saved, strict=True):
        assert (result["step"], result["extra"]) == (2, {"seen": 2})
        assert result["through"].losses == fit.losses
        assert same_bits(result["through"].weights, fit.weights)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("world_size", "fields"),
    [(2, {"frozen": "h."}), (2, {"frozen": "blocks", "share_frozen": False}), (4, {"mesh": (2, 2)})],
    ids=["shared frozen", "sharded frozen", "replicas"],
)
def test_what_several_ranks_hold_is_saved_once_and_loaded_by_all(world_size, fields, ranks: RankPool, tmp_path):
    fields = {"stage": 3, "place": "host", "directory": tmp_path / "run", **fields}
    saved = ranks.run(world_size, save_checkpoint, **fields)
    for result, fit in zip(ranks.run(world_size, resume_checkpoint, **fields), saved, strict=True):
        assert result["through"].losses == fit.losses
        assert same_bits(result["through"].weights, fit.weights)
    (path,) = complete_checkpoints(tmp_path / "run")
    numel = sum(parameter.numel() for parameter in case_of("gpt2").model().parameters())
    entries = [entry for file in path.glob("*.safetensors") for entry in load_file(file).items()]
    assert sum(values.numel() for name, values in entries if name.startswith(("master.", "weight."))) == numel


def test_each_rank_gets_its_own_buffers_back(ranks: RankPool, tmp_path):
    assert ranks.run(2, keep_buffers, directory=tmp_path) == [(True, False)] * 2


@pytest.mark.slow
def test_checkpoints_do_not_depend_on_the_number_of_ranks(ranks: RankPool, tmp_path):
    """Saved by three ranks on disk, loaded by two in host memory in another stage, by one, and by four."""
    fields = {"stage": 3, "directory": tmp_path / "run"}
    ranks.run(3, save_checkpoint, place="nvme", swap=tmp_path, wait=True, **fields)
    expected = ranks.run(3, resume_checkpoint, place="host", swap=None, **fields)[0]["loaded"]
    others = [
        ranks.run(2, resume_checkpoint, place="host", swap=None, **{**fields, "stage": 1})[0]["loaded"],
        ranks.run(4, resume_checkpoint, place="device", swap=None, **{**fields, "stage": 2})[0]["loaded"],
    ]
    with GeminiDDP(case_of("gpt2").model(seed=7), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine.load_checkpoint(tmp_path / "run")
        others.append({"model": engine.master_state_dict(), "optimizer": optimizer.state_dict()["state"]})
    for found in others:
        assert same_bits(found["model"], expected["model"])
        for index, state in expected["optimizer"].items():
            assert same_bits(found["optimizer"][index], state)
