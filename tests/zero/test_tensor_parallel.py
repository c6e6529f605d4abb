"""ZeRO around torch's tensor parallelism trains as one process does on the same batches."""

from __future__ import annotations

import pytest
import torch
import transformers
from comparison import FLOAT32_TOLERANCE, agreed, alone
from rank_cases import Fit, case_of, train_alone
from rank_pool import RankPool
from tensor_ranks import (
    overflow_on_last_tensor_rank,
    refusal_of,
    resume_checkpoint_divided,
    save_and_load_divided,
    save_checkpoint_divided,
    train_divided,
)
from training_harness import config_for, distance, hybrid_adam, same_bits

from gemini import GeminiDDP


def assert_close(found: Fit, expected: Fit) -> None:
    assert distance(found.weights, expected.weights) < FLOAT32_TOLERANCE
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-6)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("stage", "place", "sizes"),
    [
        (1, "host", (2, 2)),
        (2, "device", (2, 2)),
        (3, "host", (2, 2)),
        (3, "nvme", (2, 2)),
        (3, "mixed", (1, 2)),
        (3, "host", (1, 2)),
        (3, "host", (2, 1)),
        (3, "host", (2, 1, 2)),
    ],
    ids=str,
)
def test_llama_trains_as_one_process(stage, place, sizes, ranks: RankPool, tmp_path):
    fields = {"stage": stage, "place": place, "directory": tmp_path if place in ("nvme", "mixed") else None}
    world_size, num_parts = torch.Size(sizes).numel(), torch.Size(sizes[:-1]).numel()
    found = agreed(ranks.run(world_size, train_divided, model="llama", sizes=sizes, **fields))
    assert_close(found, alone("llama", num_parts))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2), (1, 2)], ids=str)
def test_partial_gradients_are_summed_over_tensor_ranks(sizes, ranks: RankPool):
    world_size = torch.Size(sizes).numel()
    found = agreed(ranks.run(world_size, train_divided, model="perceptrons", sizes=sizes))
    assert_close(found, alone("perceptrons", sizes[0]))


def test_clipping_uses_the_norm_over_both_dimensions(ranks: RankPool):
    adam = {"max_grad_norm": 0.01}
    found = agreed(ranks.run(4, train_divided, model="llama", sizes=(2, 2), adam=adam, num_micro=2))
    expected = train_alone(model="llama", world_size=2, adam=adam, num_micro=2)
    assert min(norm for norm in expected.norms if norm is not None) > 0.02  # so it does clip
    assert_close(found, expected)


def test_an_overflow_in_one_part_skips_the_step_on_all(ranks: RankPool):
    results = ranks.run(4, overflow_on_last_tensor_rank, sizes=(2, 2))
    assert [(result["num_skipped"], result["scale"]) for result in results] == [(1, 2.0**15)] * 4
    assert [result["kept"] for result in results] == [[True, False]] * 4
    assert all(same_bits(result["weights"], results[0]["weights"]) for result in results)


@pytest.mark.slow
def test_checkpoints_are_whole_and_go_on_with_the_same_bits(ranks: RankPool, tmp_path):
    results = ranks.run(4, save_and_load_divided, sizes=(2, 2), directory=tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")  # which the first rank alone writes
    assert same_bits(loaded.state_dict(), results[0]["saved"]["model"])
    for result in results:
        assert same_bits(result["again"], result["through"])
        assert same_bits(result["shown"], result["saved"]["model"])  # float32: weights are masters
    with GeminiDDP(case_of("llama").model(), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine.load_state_dict(results[0]["saved"]["model"])
        optimizer.load_state_dict(results[0]["saved"]["optimizer"])
        assert same_bits(engine.master_state_dict(), results[0]["saved"]["model"])


@pytest.mark.slow
def test_checkpoints_do_not_depend_on_how_parameters_are_divided(ranks: RankPool, tmp_path):
    saved = ranks.run(4, save_checkpoint_divided, sizes=(2, 2), directory=tmp_path)
    resumed = ranks.run(4, resume_checkpoint_divided, sizes=(2, 2), directory=tmp_path)
    for result, through in zip(resumed, saved, strict=True):
        assert result["through"].losses == through.losses
        assert same_bits(result["through"].weights, through.weights)
    loaded = [
        ranks.run(2, resume_checkpoint_divided, sizes=sizes, directory=tmp_path)[0]["loaded"]
        for sizes in ((1, 2), (2, 1))
    ]
    with GeminiDDP(case_of("llama").model(seed=7), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine.load_checkpoint(tmp_path)
        loaded.append({"model": engine.master_state_dict(), "optimizer": optimizer.state_dict()["state"]})
        engine.save_checkpoint(tmp_path / "whole")
    loaded.append(ranks.run(2, resume_checkpoint_divided, sizes=(1, 2), directory=tmp_path / "whole")[0]["loaded"])
    expected = resumed[0]["loaded"]
    for found in loaded:
        assert same_bits(found["model"], expected["model"])
        assert all(same_bits(found["optimizer"][i], state) for i, state in expected["optimizer"].items())


def test_a_model_on_the_meta_device_gets_the_values_of_one_process(ranks: RankPool):
    fits = ranks.run(2, train_divided, model="llama", sizes=(1, 2), is_meta=True)
    with torch.device("meta"):
        model = case_of("llama").model()
    with GeminiDDP(model, config_for("host")) as engine:
        first = engine.master_state_dict()
    untrained = agreed(ranks.run(2, train_divided, model="llama", sizes=(1, 2), is_meta=True, num_steps=0))
    assert same_bits(untrained.weights, first)
    assert not same_bits(agreed(fits).weights, first)


def test_weights_in_bfloat16_train_alike(ranks: RankPool):
    fields = {"model": "llama", "dtype": torch.bfloat16, "num_steps": 2}
    found = agreed(ranks.run(2, train_divided, sizes=(1, 2), place="device", **fields))
    assert distance(found.weights, alone(world_size=1, **fields).weights) < 2e-3


def test_batches_in_slices_train_alike(ranks: RankPool):
    fields = {"model": "perceptrons", "num_batch_slices": 2}
    found = agreed(ranks.run(2, train_divided, sizes=(1, 2), **fields))
    assert_close(found, alone(world_size=1, **fields))


@pytest.mark.parametrize(
    ("fault", "type_name", "message"),
    [
        ("no mesh", "ConfigError", "parameter norm.weight is a DTensor on"),
        ("same mesh", "ConfigError", "which shares ranks [0, 1] with"),
        ("no zero", "ModelError", "parameter norm.weight is a DTensor, and other ranks hold parts of it"),
        ("uneven", "ModelError", "parameter up.weight has 33 elements in dimension 0, which 2 ranks cannot share"),
        ("partial", "ModelError", "parameter up.weight has placement"),
        ("two dimensions", "ModelError", "parameter up.weight is a DTensor on a mesh of 2 dimensions: expected one"),
        ("two meshes", "ModelError", "parameters norm.weight and up.weight are DTensors on different meshes"),
        ("seed", "ModelError", "have different first values of parameters"),
    ],
)
def test_what_cannot_be_is_refused(fault, type_name, message, ranks: RankPool):
    for failure in ranks.try_run(2, refusal_of, fault=fault):
        assert failure.type_name == type_name
        assert message in failure.message
