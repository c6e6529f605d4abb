"""Every kind of adapter is saved as peft saves it: stored, shared between layers, or computed when it is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from directories import outputs, plain_model, tensors_in
from model_zoo import HF_CASES
from training_harness import config_for, hybrid_adam, same_bits, step

from gemini import GeminiDDP

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CASE = HF_CASES["llama"]
TASK = {"task_type": "CAUSAL_LM"}
PROMPT = {**TASK, "num_virtual_tokens": 4}
LAYERS = {**TASK, "target_modules": ["q_proj"]}

KINDS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: peft.PromptTuningConfig(**PROMPT),
    "prefix": lambda: peft.PrefixTuningConfig(**PROMPT),
    "prefix, projected": lambda: peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=16),
    "p-tuning": lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=16),
    "p-tuning, LSTM": lambda: peft.PromptEncoderConfig(
        **PROMPT, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(**PROMPT, num_tasks=2),
    "vera": lambda: peft.VeraConfig(**LAYERS, r=4),
    "vera, projections left out": lambda: peft.VeraConfig(**LAYERS, r=4, save_projection=False),
    "randlora": lambda: peft.RandLoraConfig(**LAYERS, r=4),
    "vb-lora": lambda: peft.VBLoRAConfig(**LAYERS, num_vectors=16, vector_length=8),
    "vb-lora, best": lambda: peft.VBLoRAConfig(**LAYERS, num_vectors=16, vector_length=8, save_only_topk_weights=True),
    "adalora": lambda: peft.AdaLoraConfig(**LAYERS, total_step=10, init_r=4, target_r=2),
    "shira": lambda: peft.ShiraConfig(**LAYERS, r=4),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(**TASK, adapter_len=4, adapter_layers=1),
    "trainable tokens": lambda: peft.TrainableTokensConfig(**TASK, token_indices=[1, 2]),
    "lora with biases": lambda: peft.LoraConfig(**LAYERS, bias="all"),
}


def build(kind: str) -> Any:
    base = plain_model("llama")
    torch.manual_seed(1)
    return peft.get_peft_model(base, KINDS[kind]())


@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_saved(kind: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    build(kind).save_pretrained(tmp_path / "plain")
    with GeminiDDP(build(kind), config_for(place, tmp_path / "swap")) as engine:
        engine.save_pretrained(tmp_path / "ours")
    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        path.name for path in (tmp_path / "plain").iterdir()
    }
    configs = [(tmp_path / place / "adapter_config.json").read_text() for place in ("ours", "plain")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "vera", "vb-lora, best", "shira"])
def test_what_was_trained_and_saved_opens_in_peft(kind: str, tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    with GeminiDDP(build(kind), config_for("nvme", tmp_path / "swap")) as engine:
        step(engine, hybrid_adam(engine.parameters()), CASE, CASE.batches(1)[0])
        engine.save_pretrained(tmp_path / "ours")
        weights = engine.state_dict()
    trained = build(kind)
    trained.load_state_dict(weights)
    trained.save_pretrained(tmp_path / "plain")
    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))
    opened = [
        peft.PeftModel.from_pretrained(plain_model("llama"), tmp_path / name).eval() for name in ("ours", "plain")
    ]
    assert all(map(torch.equal, outputs(opened[0], CASE), outputs(opened[1], CASE)))


def test_ranks_that_adalora_has_chosen_are_saved(tmp_path: Path) -> None:
    def chosen() -> Any:
        model = build("adalora")
        name = next(name for name in model.state_dict() if name.endswith("lora_E.default"))
        model.peft_config["default"].rank_pattern = {name.removeprefix("base_model.model."): [True, False, True, False]}
        return model

    (tmp_path / "swap").mkdir()
    chosen().save_pretrained(tmp_path / "plain")
    with GeminiDDP(chosen(), config_for("nvme", tmp_path / "swap")) as engine:
        engine.save_pretrained(tmp_path / "ours")
    assert same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "plain"))


def test_buffers_that_layers_share_are_one_in_every_state_dict(tmp_path: Path) -> None:
    twin = build("vera")
    with GeminiDDP(build("vera"), config_for("nvme", tmp_path)) as engine:
        for state in (engine.state_dict(), engine.module.state_dict()):
            assert same_bits(state, twin.state_dict())
        state = engine.state_dict()
        shared = [value.data_ptr() for name, value in state.items() if "vera_A" in name]
        assert len(shared) > 1
        assert len(set(shared)) == 1
        assert not any(engine.load_state_dict(twin.state_dict()))
