"""The wrapped model's own ways of saving see every weight; its own way of loading is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_zoo import HF_CASES
from torch import nn
from training_harness import PLACEMENTS, config_for, engine_and_twin, same_bits

from gemini import GeminiDDP, ModelError

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", PLACEMENTS)
def test_the_wrapped_model_and_its_modules_load_as_the_engine_does(place, dtype, tmp_path):
    given = GPT2.model(seed=1).state_dict()
    with GeminiDDP(GPT2.model(), config_for(place, tmp_path, dtype=dtype)) as engine:
        engine.module.load_state_dict(given)
        assert same_bits(engine.master_state_dict(), given)
        blocks = GPT2.model(seed=2).transformer.h.state_dict()
        engine.module.transformer.h.load_state_dict(blocks)
        masters = engine.master_state_dict()
        assert same_bits({name: masters[f"transformer.h.{name}"] for name in blocks}, blocks)
        with pytest.raises(RuntimeError, match="would remove its parameters from their chunks"):
            engine.module.load_state_dict(given, assign=True)


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


def normed_twice() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)


def test_a_module_that_is_there_twice_keeps_all_names_of_its_buffers() -> None:
    twin = normed_twice()
    twin(torch.randn(4, 8))  # running means move
    with GeminiDDP(copy.deepcopy(twin), config_for("host")) as engine:
        for saved in (engine.state_dict(), engine.master_state_dict(), engine.module.state_dict()):
            assert same_bits(saved, twin.state_dict())
        without_one_name = {name: value for name, value in twin.state_dict().items() if not name.startswith("1.")}
        assert engine.load_state_dict(without_one_name).missing_keys == []


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.transformer.ln_f, "weight", nn.Parameter(torch.ones(32))),
        lambda model: model.add_module("probe", nn.Linear(2, 2)),
        lambda model: model.transformer.h.pop(1),
        lambda model: model.transformer.add_module("last", model.transformer._modules.pop("ln_f")),
    ],
    ids=["replaced", "added", "removed", "renamed"],
)
@pytest.mark.parametrize(
    "save",
    [
        lambda engine, path: engine.save_pretrained(path),
        lambda engine, path: engine.save_checkpoint(path),
        lambda engine, path: engine.state_dict(),
        lambda engine, path: engine.module.state_dict(),
    ],
    ids=["save_pretrained", "save_checkpoint", "state_dict", "module.state_dict"],
)
def test_a_model_that_was_changed_is_not_saved_as_what_it_was(
    change: Callable[[Any], object], save: Callable[[GeminiDDP, Path], object], tmp_path: Path
) -> None:
    with GeminiDDP(GPT2.model(), config_for("host")) as engine:
        change(engine.module)
        with pytest.raises(ModelError, match="parameter .* was added, removed, replaced or resized"):
            save(engine, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrapped_model_is_not_resized() -> None:
    with (
        GeminiDDP(GPT2.model(), config_for("host")) as engine,
        pytest.raises(ModelError, match=r"replaced by a tensor of .* change the model before wrapping it"),
    ):
        engine.module.resize_token_embeddings(engine.module.config.vocab_size + 3, mean_resizing=False)
