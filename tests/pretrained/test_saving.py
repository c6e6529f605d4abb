"""What is saved from any tier is what transformers, or peft, saves, and opens there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from directories import config_of, outputs, plain_model, same_outputs, tensors_in
from model_zoo import HAND_CASES, HF_CASES
from training_harness import PLACEMENTS, config_for, same_bits

import gemini
from gemini import GeminiDDP

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def assert_opens(path: Path, expected: Any, name: str, **fields: Any) -> None:
    found, info = type(expected).from_pretrained(path, output_loading_info=True, **fields)
    assert not any(info.values())
    assert same_bits(found.state_dict(), expected.state_dict())
    assert same_outputs(found, expected, HF_CASES[name])


@pytest.mark.parametrize("name", HF_CASES)
def test_every_family_is_saved_as_transformers_saves_it(name: str, tmp_path: Path) -> None:
    model = plain_model(name)
    model.save_pretrained(tmp_path / "plain")

    with GeminiDDP(plain_model(name), config_for("nvme", tmp_path)) as engine:
        engine.save_pretrained(tmp_path / "ours")

    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "plain")
    assert_opens(tmp_path / "ours", model, name)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "swin"])
def test_every_tier_is_saved_in_shards_with_an_index(name: str, place: str, tmp_path: Path) -> None:
    model = plain_model(name)
    with GeminiDDP(plain_model(name), config_for(place, tmp_path)) as engine:
        engine.save_pretrained(tmp_path / "ours", max_shard_size="30KB")

    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["weight_map"].keys() == tensors_in(tmp_path / "ours").keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(tmp_path / "ours").values())
    assert len(shards) > 3
    assert_opens(tmp_path / "ours", model, name)


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    with GeminiDDP(plain_model("gpt2"), config_for("host")) as engine:
        engine.save_pretrained(tmp_path, max_shard_size=30_000)

    sizes = [shard.stat().st_size for shard in tmp_path.glob("model-*.safetensors")]
    assert max(sizes) < 30_000 + 4_000  # of header
    assert len(sizes) <= 2 * sum(sizes) / 30_000


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
def test_half_precision_saves_working_weights_or_masters(place: str, tmp_path: Path) -> None:
    model = plain_model("llama")
    with GeminiDDP(plain_model("llama"), config_for(place, tmp_path, dtype=torch.bfloat16)) as engine:
        engine.save_pretrained(tmp_path / "working")
        engine.save_pretrained(tmp_path / "masters", dtype="float32")
        engine.save_pretrained(tmp_path / "fp16", dtype=torch.float16)

    assert config_of(tmp_path / "working")["dtype"] == "bfloat16"
    assert config_of(tmp_path / "masters")["dtype"] == "float32"
    assert_opens(tmp_path / "masters", model, "llama")
    assert same_bits(tensors_in(tmp_path / "fp16"), {n: t.half() for n, t in model.state_dict().items()})
    working = plain_model("llama").bfloat16()
    assert same_bits(tensors_in(tmp_path / "working"), working.state_dict())


def test_the_running_model_is_left_as_it_is(tmp_path: Path) -> None:
    case = HF_CASES["gpt2"]
    with GeminiDDP(plain_model("gpt2"), config_for("nvme", tmp_path)) as engine:
        before, dtype = outputs(engine, case), engine.module.config.dtype
        engine.save_pretrained(tmp_path / "ours", dtype="bfloat16")
        assert engine.module.config.dtype == dtype
        assert all(map(torch.equal, outputs(engine, case), before))


@pytest.mark.parametrize("name", ["vit", "mixtral", "gpt2"])
def test_what_was_loaded_is_saved_as_the_same_tensors(name: str, tmp_path: Path) -> None:
    plain_model(name).save_pretrained(tmp_path / "first")

    with gemini.load_pretrained(tmp_path / "first", config_for("nvme", tmp_path)) as engine:
        engine.save_pretrained(tmp_path / "second")

    assert same_bits(tensors_in(tmp_path / "second"), tensors_in(tmp_path / "first"))


def test_a_base_model_s_names_are_saved_as_transformers_saves_them(tmp_path: Path) -> None:
    plain_model("llama").model.save_pretrained(tmp_path / "base")
    expected = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    expected.save_pretrained(tmp_path / "plain")

    with gemini.load_pretrained(tmp_path / "base", config_for("host"), model_class=hf.LlamaForCausalLM) as engine:
        engine.save_pretrained(tmp_path / "ours")

    assert tensors_in(tmp_path / "ours").keys() == tensors_in(tmp_path / "plain").keys()


def test_models_that_are_not_of_transformers_are_saved_under_their_own_names(tmp_path: Path) -> None:
    model = HAND_CASES["conv_net"].model(seed=3)
    with GeminiDDP(HAND_CASES["conv_net"].model(seed=3), config_for("host")) as engine:
        engine.save_pretrained(tmp_path)

    assert same_bits(tensors_in(tmp_path), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


# ---------------------------------------------------------------- adapters


def with_adapters(model: Any, **fields: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **fields))


def base_in(path: Path) -> Any:
    return hf.LlamaForCausalLM.from_pretrained(path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    plain_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


ADAPTERS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["embed_tokens", "down_proj"], "use_rslora": True},
    {"target_modules": ["q_proj"], "use_dora": True},
]


@pytest.mark.parametrize("fields", ADAPTERS, ids=lambda fields: "-".join([*fields][:2]))
@pytest.mark.parametrize("place", ["host", "nvme"])
def test_adapters_are_saved_for_peft(place: str, fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = with_adapters(base_in(base), init_lora_weights=False, **fields).eval()
    expected.save_pretrained(tmp_path / "plain")
    torch.manual_seed(1)
    model = with_adapters(base_in(base), init_lora_weights=False, **fields).eval()

    with GeminiDDP(model, config_for(place, tmp_path)) as engine:
        engine.save_pretrained(tmp_path / "ours")

    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))
    found = peft.PeftModel.from_pretrained(base_in(base), tmp_path / "ours").eval()
    assert same_outputs(found, expected, HF_CASES["llama"])
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files


def test_a_tied_embedding_with_an_adapter_is_saved_for_peft(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(1)
        return with_adapters(plain_model("gpt2"), target_modules=["wte", "c_attn"], init_lora_weights=False)

    build().save_pretrained(tmp_path / "plain")
    with GeminiDDP(build(), config_for("host")) as engine:
        engine.save_pretrained(tmp_path / "ours")

    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))


def test_several_adapters_go_to_directories_of_their_own(base: Path, tmp_path: Path) -> None:
    model = with_adapters(base_in(base), target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "plain")

    with GeminiDDP(model, config_for("host")) as engine:
        engine.save_pretrained(tmp_path / "ours")

    for folder in ("", "other"):
        assert same_bits(tensors_in(tmp_path / "ours" / folder), tensors_in(tmp_path / "plain" / folder))
    assert (tmp_path / "ours" / "other" / "adapter_config.json").exists()


@pytest.mark.parametrize("fields", ADAPTERS[:3], ids=lambda fields: "-".join([*fields][:2]))
def test_adapters_over_a_streamed_base_begin_as_the_base(fields: dict[str, Any], base: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = with_adapters(hf.LlamaForCausalLM(hf.AutoConfig.from_pretrained(base)), **fields).eval()

    with GeminiDDP(model, config_for("nvme", tmp_path), weights=base) as engine:
        assert engine.loading_report.missing_keys == ()
        assert same_outputs(engine, base_in(base), HF_CASES["llama"])
        engine.save_pretrained(tmp_path / "ours")

    first = [t for name, t in tensors_in(tmp_path / "ours").items() if "lora_A" in name or "embedding_B" in name]
    assert all(tensor.std() > 0.01 for tensor in first)


def test_adapters_that_begin_as_functions_of_the_base_are_refused_without_it(base: Path) -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.AutoConfig.from_pretrained(base))
        model = with_adapters(model, target_modules=["q_proj"], init_lora_weights="olora")

    with pytest.raises(gemini.ModelError, match="init_lora_weights='olora' needs the base model's weights"):
        GeminiDDP(model, config_for("host"), weights=base)
