"""A trainer saves a model by the model's own means, and itself by its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from trainer_runs import Texts, arguments, build_model, is_close, logged
from training_harness import config_for, same_bits

from gemini import GeminiDDP, HybridAdam
from gemini.integrations.accelerate import GeminiAccelerator
from gemini.integrations.transformers import GeminiTrainer, GeminiTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # peft's calls


class Mine(transformers.LlamaForCausalLM):
    """Adds a file to what transformers writes."""

    def save_pretrained(self, directory: str, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(directory, *args, **kwargs)
        (Path(directory) / "modules.json").write_text("{}")


class Pipeline(nn.Sequential):
    """Saves its parts by themselves, as sentence-transformers' models do."""

    def forward(self, **inputs: Any) -> Any:
        return self[0](**inputs)

    def save_pretrained(self, path: str) -> None:
        self[0].save_pretrained(path)
        (Path(path) / "modules.json").write_text(json.dumps(["0"]))


class OwnTrainer(transformers.Trainer):
    """Saves in a way of its own, as sentence-transformers' trainer does."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        path = Path(output_dir or self.args.output_dir)
        path.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(str(path))
        norm = sum(param.detach().abs().sum().item() for param in self.model.parameters())
        (path / "trainer.json").write_text(json.dumps(norm))


class GeminiOwnTrainer(GeminiTrainerMixin, OwnTrainer):
    pass


def mine() -> Any:
    torch.manual_seed(0)
    return Mine(build_model("llama").config)


def pipeline() -> Any:
    return Pipeline(build_model("llama"))


def run(kind: Any, model: Any, directory: Path, **fields: Any) -> Any:
    given = arguments(
        directory, max_steps=2, save_strategy="steps", save_steps=1, learning_rate=0.0, remove_unused_columns=False
    )
    trainer = kind(model, given, train_dataset=Texts(), **fields)
    trainer.train()
    trainer.save_model(str(directory / "model"))
    return trainer


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("place", ["host", "nvme"])
@pytest.mark.parametrize(
    ("kinds", "build"),
    [
        ((transformers.Trainer, GeminiTrainer), mine),
        ((OwnTrainer, GeminiOwnTrainer), mine),
        ((OwnTrainer, GeminiOwnTrainer), pipeline),
    ],
    ids=["model", "model and trainer", "pipeline and trainer"],
)
def test_its_files_are_there_and_hold_the_weights(
    kinds: tuple[Any, Any], build: Callable[[], Any], place: str, tmp_path: Path
) -> None:
    run(kinds[0], build(), tmp_path / "plain")
    (tmp_path / "swap").mkdir()
    found = run(kinds[1], build(), tmp_path / "ours", gemini=config_for(place, tmp_path / "swap"))
    found.engine.close()
    for folder in ("model", "checkpoint-1", "checkpoint-2"):
        paths = tmp_path / "ours" / folder, tmp_path / "plain" / folder
        assert files_in(paths[0]) >= files_in(paths[1]) - {"optimizer.pt", "scheduler.pt"}
        assert same_bits(*(load_file(path / "model.safetensors") for path in paths))
        if (paths[1] / "trainer.json").exists():
            assert (paths[0] / "trainer.json").read_text() == (paths[1] / "trainer.json").read_text()
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "model")
    assert opened.num_parameters() == build_model("llama").num_parameters()


def test_a_model_without_save_pretrained_is_saved_by_its_state_dict(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model("llama")

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    run(transformers.Trainer, Plain(), tmp_path / "plain")
    (tmp_path / "swap").mkdir()
    run(GeminiTrainer, Plain(), tmp_path / "ours", gemini=config_for("nvme", tmp_path / "swap")).engine.close()
    saved = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("ours", "plain")]
    assert same_bits(*saved)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "vera"])
def test_prompts_and_shared_projections_are_saved_and_gone_on_from(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    task = {"task_type": "CAUSAL_LM"}
    prompt = {**task, "num_virtual_tokens": 4}

    def build() -> Any:
        config = {
            "prompt": lambda: peft.PromptTuningConfig(**prompt),
            "prefix": lambda: peft.PrefixTuningConfig(**prompt),
            "p-tuning": lambda: peft.PromptEncoderConfig(**prompt, encoder_hidden_size=16),
            "vera": lambda: peft.VeraConfig(**task, target_modules=["q_proj"], r=4),
        }[kind]()
        base = build_model("llama")
        torch.manual_seed(1)
        return peft.get_peft_model(base, config)

    def trainer(cls: Any, directory: Path, **fields: Any) -> Any:
        given = arguments(directory, max_steps=4, save_strategy="steps", save_steps=2)
        return cls(build(), given, train_dataset=Texts(), **fields)

    expected = trainer(transformers.Trainer, tmp_path / "plain")
    expected.train()
    (tmp_path / "swap").mkdir()
    gemini = config_for("nvme", tmp_path / "swap")
    found = trainer(GeminiTrainer, tmp_path / "ours", gemini=gemini)
    found.train()
    found.engine.close()
    assert is_close(logged(found, "loss"), logged(expected, "loss"))
    for step in (2, 4):
        ours, plain = (
            load_file(tmp_path / name / f"checkpoint-{step}" / "adapter_model.safetensors")
            for name in ("ours", "plain")
        )
        assert ours.keys() == plain.keys()
        assert all(torch.allclose(ours[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)
    resumed = trainer(GeminiTrainer, tmp_path / "ours", gemini=gemini)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    resumed.engine.close()
    assert logged(resumed, "loss") == logged(found, "loss")
    peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "ours" / "checkpoint-4")


@pytest.mark.parametrize("place", ["host", "nvme"])
def test_accelerate_saves_an_engine_in_its_own_ways(place: str, tmp_path: Path) -> None:
    """As transformers' examples without a trainer end."""
    twin = build_model("gpt2")
    (tmp_path / "swap").mkdir()
    accelerator = GeminiAccelerator(cpu=True)
    with GeminiDDP(build_model("gpt2"), config_for(place, tmp_path / "swap")) as engine:
        model, _ = accelerator.prepare(engine, HybridAdam(engine.parameters()))
        unwrapped = accelerator.unwrap_model(model)
        state = accelerator.get_state_dict(model)
        assert same_bits(dict(state), dict(twin.state_dict()))
        unwrapped.save_pretrained(tmp_path / "unwrapped", is_main_process=True, state_dict=state)
        unwrapped.save_pretrained(tmp_path / "by itself")
        accelerator.save_model(model, tmp_path / "accelerate")
    for name in ("unwrapped", "by itself"):
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert same_bits(dict(opened.state_dict()), dict(twin.state_dict()))
    saved = load_file(tmp_path / "accelerate" / "model.safetensors")
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in saved.items())
    assert len(saved) >= len(list(twin.parameters()))
