"""TRL's trainers whose loss needs a reference, for which adapters are switched off, beside the plain trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_trl import tokenizer
from trainer_runs import build_model, is_close, logged
from training_harness import config_for

from gemini.integrations.transformers import GeminiTrainerMixin

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl", minversion="1.16")
peft = pytest.importorskip("peft")

# TRL's and peft's calls, and TRL's notes on what is experimental.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class GeminiDPOTrainer(GeminiTrainerMixin, trl.DPOTrainer):
    pass


class GeminiKTOTrainer(GeminiTrainerMixin, trl.KTOTrainer):
    pass


class GeminiGRPOTrainer(GeminiTrainerMixin, trl.GRPOTrainer):
    pass


def words(row: int, count: int, factor: int) -> str:
    return " ".join(f"w{(factor * row + 5 * word) % 100}" for word in range(count))


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


PAIRS = {
    "prompt": [words(row, 4, 17) for row in range(16)],
    "chosen": [" " + words(row, 5, 3) for row in range(16)],
    "rejected": [" " + words(row, 3, 7) for row in range(16)],
}
LABELLED = {
    "prompt": PAIRS["prompt"],
    "completion": PAIRS["chosen"],
    "label": [row % 2 == 0 for row in range(16)],
}
PROMPTS = {"prompt": PAIRS["prompt"]}

KINDS: dict[str, tuple[Any, Any, Any, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "dpo": (
        trl.DPOTrainer,
        GeminiDPOTrainer,
        trl.DPOConfig,
        {"max_length": 16},
        {"train_dataset": PAIRS},
        ("loss", "grad_norm", "rewards/margins"),
    ),
    "kto": (
        trl.KTOTrainer,
        GeminiKTOTrainer,
        trl.KTOConfig,
        {"max_length": 16},
        {"train_dataset": LABELLED},
        ("loss", "grad_norm"),
    ),
    "grpo": (
        trl.GRPOTrainer,
        GeminiGRPOTrainer,
        trl.GRPOConfig,
        {"beta": 0.04, "num_generations": 2, "max_completion_length": 6},
        {"train_dataset": PROMPTS, "reward_funcs": length_reward},
        ("loss", "grad_norm", "reward", "kl"),
    ),
}


def run(cls: Any, config: Any, directory: Path, fields: dict[str, Any], **given: Any) -> Any:
    arguments = config(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        adam_epsilon=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **fields,
    )
    data = {**given, "train_dataset": datasets.Dataset.from_dict(given["train_dataset"])}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = cls(model=build_model("llama"), args=arguments, processing_class=tokenizer(), peft_config=lora, **data)
    trainer.train()
    return trainer


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("place", ["nvme", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_switched_off_for_the_reference(kind: str, place: str, tmp_path: Path) -> None:
    plain, ours, config, fields, given, keys = KINDS[kind]
    expected = run(plain, config, tmp_path, fields, **given)
    found = run(ours, config, tmp_path, fields, **given, gemini=config_for(place, tmp_path))
    found.engine.close()
    for key in keys:
        # What is near zero is a difference of numbers near one.
        assert logged(found, key) == pytest.approx(logged(expected, key), rel=2e-5, abs=2e-6), key
    assert is_close(logged(found, "learning_rate"), logged(expected, "learning_rate"))
    assert len(logged(found, "loss")) == 3
