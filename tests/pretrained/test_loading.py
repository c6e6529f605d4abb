"""What is streamed from a checkpoint into any tier is what transformers loads."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from directories import plain_model, rewrite, same_outputs, tensors_in
from model_zoo import HAND_CASES, HF_CASES
from safetensors.torch import save_file
from torch import nn
from training_harness import PLACEMENTS, config_for, same_bits

import gemini
from gemini import GeminiDDP

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", HF_CASES)
def test_every_family_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    model = plain_model(name)
    model.save_pretrained(tmp_path)

    with gemini.load_pretrained(tmp_path, config_for("host")) as engine:
        assert type(engine.module) is type(model)
        assert not any(module.training for module in engine.modules())
        assert same_bits(engine.master_state_dict(), model.state_dict())
        assert same_outputs(engine, model, HF_CASES[name])
        assert engine.loading_report.missing_keys == ()
        assert engine.loading_report.unexpected_keys == ()


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "swin"])
def test_weights_arrive_in_every_tier_from_several_files(name: str, place: str, tmp_path: Path) -> None:
    model = plain_model(name)
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3

    with gemini.load_pretrained(tmp_path / "model", config_for(place, tmp_path)) as engine:
        assert same_bits(engine.master_state_dict(), model.state_dict())
        assert same_outputs(engine, model, HF_CASES[name])


@pytest.mark.parametrize("working", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masters_are_the_stored_values_and_working_weights_their_nearest(
    stored: torch.dtype, working: torch.dtype, tmp_path: Path
) -> None:
    model = plain_model("llama").to(stored)
    model.save_pretrained(tmp_path)

    with gemini.load_pretrained(tmp_path, config_for("host", dtype=working)) as engine:
        assert same_bits(engine.master_state_dict(), {n: t.float() for n, t in model.state_dict().items()})
        found = engine.state_dict()
    for name, value in model.state_dict().items():
        assert found[name].dtype is working
        error, least = (found[name].double() - value).abs(), (value.to(working).double() - value).abs()
        assert torch.equal(error, least)  # of two that are equally near it may be the other one


def test_the_class_and_the_configuration_can_be_chosen(tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    model_config = hf.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")

    with gemini.load_pretrained(
        tmp_path, config_for("host"), model_class=hf.AutoModelForCausalLM, model_config=model_config
    ) as engine:
        assert type(engine.module) is hf.LlamaForCausalLM
        assert engine.module.config._attn_implementation == "eager"


def test_the_generation_configuration_comes_along(tmp_path: Path) -> None:
    model = plain_model("gpt2")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)

    with gemini.load_pretrained(tmp_path, config_for("host")) as engine:
        assert engine.module.generation_config.max_new_tokens == 7


def test_values_of_a_model_that_has_some_are_replaced(tmp_path: Path) -> None:
    model = plain_model("gpt2")
    model.save_pretrained(tmp_path)

    with GeminiDDP(HF_CASES["gpt2"].model(seed=9), config_for("host"), weights=tmp_path) as engine:
        assert same_bits(engine.master_state_dict(), model.state_dict())


@pytest.mark.parametrize("on_meta", [True, False])
def test_models_that_are_not_of_transformers_load_under_their_own_names(on_meta: bool, tmp_path: Path) -> None:
    case = HAND_CASES["conv_net"]
    model = case.model(seed=3)
    model(**case.batches(1)[0])  # batch norms count
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta" if on_meta else "cpu"):
        other = case.model(seed=4)

    with GeminiDDP(other, config_for("host"), weights=tmp_path) as engine:
        assert same_bits(engine.master_state_dict(), model.state_dict())


@pytest.mark.parametrize("names", [("1.", "3."), ("1.",), ("3.",)], ids=str)
def test_buffers_of_a_module_that_is_there_twice_load_under_either_name(names: tuple[str, ...], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    model.append(model[1])
    model(torch.randn(4, 8))
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(("0.", *names))}
    save_file(tensors, tmp_path / "model.safetensors")
    other = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    other.append(other[1])

    with GeminiDDP(other, config_for("host"), weights=tmp_path) as engine:
        assert same_bits(engine.master_state_dict(), model.state_dict())
        assert engine.loading_report.missing_keys == engine.loading_report.unexpected_keys == ()


# ---------------------------------------------------------------- what does not belong together


def loaded_by_transformers(model_class: Any, path: Path) -> tuple[Any, tuple[set[str], set[str]]]:
    model, info = model_class.from_pretrained(path, output_loading_info=True)
    return model, (set(info["missing_keys"]), set(info["unexpected_keys"]))


@pytest.mark.parametrize(
    ("saved", "part", "wanted"),
    [
        ("llama", "model", hf.LlamaForCausalLM),  # the head is missing
        ("llama", "", hf.LlamaModel),  # the head is too much
        ("gpt2", "transformer", hf.GPT2LMHeadModel),  # the head is tied to what is there
        ("bert", "", hf.BertForSequenceClassification),  # one head too much, another missing
        ("vit", "", hf.ViTModel),
        ("mixtral", "model", hf.MixtralForCausalLM),
        ("clip", "", hf.CLIPVisionModel),
    ],
)
def test_missing_and_unexpected_names_are_those_that_transformers_reports(
    saved: str, part: str, wanted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = plain_model(saved)
    (model.get_submodule(part) if part else model).save_pretrained(tmp_path)
    expected, names = loaded_by_transformers(wanted, tmp_path)

    with (
        caplog.at_level(logging.WARNING, "gemini"),
        gemini.load_pretrained(tmp_path, config_for("host"), model_class=wanted) as engine,
    ):
        report, weights = engine.loading_report, engine.master_state_dict()

    assert (set(report.missing_keys), set(report.unexpected_keys)) == names
    stored = {name: value for name, value in expected.state_dict().items() if name not in names[0]}
    assert same_bits({name: weights[name] for name in stored}, stored)
    assert all(name in caplog.text for name in sorted(names[0])[:1])


def test_missing_weights_get_the_values_of_a_new_model(tmp_path: Path) -> None:
    model = plain_model("llama")
    model.model.save_pretrained(tmp_path)

    with gemini.load_pretrained(tmp_path, config_for("host"), model_class=hf.LlamaForCausalLM) as engine:
        head = engine.master_state_dict()["lm_head.weight"]

    assert abs(head.std() / model.config.initializer_range - 1) < 0.1


@pytest.mark.parametrize("is_equal", [True, False])
def test_weights_that_are_tied_but_stored_twice_stay_tied_if_they_are_equal(is_equal: bool, tmp_path: Path) -> None:
    plain_model("gpt2").save_pretrained(tmp_path)

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["transformer.wte.weight"].clone()
        head[-1, -1] += 0 if is_equal else 1
        tensors["lm_head.weight"] = head

    rewrite(tmp_path, add_head)
    expected = hf.GPT2LMHeadModel.from_pretrained(tmp_path)

    with gemini.load_pretrained(tmp_path, config_for("host")) as engine:
        embedding, head = engine.module.transformer.wte.weight, engine.module.lm_head.weight
        assert (head is embedding) is is_equal
        assert engine.loading_report.untied_keys == (() if is_equal else ("lm_head.weight",))
        assert same_bits(engine.master_state_dict(), expected.state_dict())
        engine.save_pretrained(tmp_path / "again")
    assert ("lm_head.weight" in tensors_in(tmp_path / "again")) is not is_equal


def test_without_transformers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_model("gpt2").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(gemini.ConfigError, match="gemini.load_pretrained needs transformers 5 .* pip install 'transf"):
        gemini.load_pretrained(tmp_path, config_for("host"))


def test_names_of_earlier_versions_are_understood(tmp_path: Path) -> None:
    model = plain_model("bert")
    model.save_pretrained(tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm.weight" in name]:
            tensors[name.replace("weight", "gamma")] = tensors.pop(name)

    rewrite(tmp_path, rename)

    with gemini.load_pretrained(tmp_path, config_for("host")) as engine:
        assert same_bits(engine.master_state_dict(), model.state_dict())
        assert engine.loading_report.missing_keys == ()
