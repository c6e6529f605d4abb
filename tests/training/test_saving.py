"""The wrapped model's own ways of saving see every weight; its own way of loading is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from model_zoo import HF_CASES
from training_harness import config_for, engine_and_twin, same_bits

from gemini import ModelError

GPT2 = HF_CASES["gpt2"]


@pytest.mark.parametrize("place", ["host", "nvme", "device"])
def test_the_wrapped_models_state_dict_shows_weights_that_are_away(place, tmp_path):
    with engine_and_twin(GPT2, config_for(place, tmp_path)) as (engine, twin):
        assert same_bits(engine.module.state_dict(), twin.state_dict())


def test_save_pretrained_writes_what_from_pretrained_reads(tmp_path):
    (tmp_path / "swap").mkdir()
    with engine_and_twin(GPT2, config_for("nvme", tmp_path / "swap")) as (engine, twin):
        engine.module.save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert same_bits(loaded.state_dict(), twin.state_dict())


def test_loading_into_the_wrapped_model_is_refused(tmp_path):
    with (
        engine_and_twin(GPT2, config_for("host", tmp_path)) as (engine, twin),
        pytest.raises(ModelError, match=r"call engine\.load_state_dict"),
    ):
        engine.module.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("of", [lambda engine: engine, lambda engine: engine.module], ids=["engine", "model"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copying_and_pickling_are_refused(duplicate, of, tmp_path):
    with (
        engine_and_twin(GPT2, config_for("host", tmp_path)) as (engine, _),
        pytest.raises(ModelError, match="cannot be copied or pickled: .* load engine.state_dict"),
    ):
        duplicate(of(engine))


def test_a_closed_engine_lets_go_of_saving_and_loading(tmp_path):
    with engine_and_twin(GPT2, config_for("host", tmp_path)) as (engine, twin):
        model = engine.module
    model.load_state_dict(twin.state_dict(), assign=True)
    assert same_bits(model.state_dict(), twin.state_dict())
