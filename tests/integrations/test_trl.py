"""TRL's SFTTrainer over an engine, by the same mixin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_runs import build_model, is_close, logged
from training_harness import config_for

from gemini.integrations.transformers import GeminiTrainerMixin

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl", minversion="1.16")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed:FutureWarning"
)  # TRL's and peft's calls


class GeminiSFTTrainer(GeminiTrainerMixin, trl.SFTTrainer):
    pass


def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(100))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


def texts() -> Any:
    rows = [" ".join(f"w{(17 * row + 5 * word) % 100}" for word in range(6 + row % 7)) for row in range(16)]
    return datasets.Dataset.from_dict({"text": rows})


def run(kind: type, directory: Path, **fields: Any) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(directory),
        per_device_train_batch_size=4,
        max_steps=5,
        learning_rate=1e-3,
        adam_epsilon=1e-5,
        max_grad_norm=0.5,
        logging_steps=1,
        max_length=16,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = kind(build_model("llama"), arguments, train_dataset=texts(), processing_class=tokenizer(), **fields)
    trainer.train()
    return trainer


def test_curves_are_the_plain_sft_trainers(tmp_path: Path) -> None:
    expected = run(trl.SFTTrainer, tmp_path)
    found = run(GeminiSFTTrainer, tmp_path, gemini=config_for("nvme", tmp_path))
    report = found.engine.memory_report()
    found.engine.close()
    assert logged(found, "loss")[0] == logged(expected, "loss")[0]
    for key in ("loss", "grad_norm", "mean_token_accuracy", "entropy"):
        assert is_close(logged(found, key), logged(expected, key)), key
    assert report.nvme_read_nbytes > 0


def test_adapters_of_the_trainers_own_making_train_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def lora() -> Any:
        return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    expected = run(trl.SFTTrainer, tmp_path, peft_config=lora())
    found = run(GeminiSFTTrainer, tmp_path, peft_config=lora(), gemini=config_for("mixed", tmp_path))
    found.engine.close()
    assert is_close(logged(found, "loss"), logged(expected, "loss"))
