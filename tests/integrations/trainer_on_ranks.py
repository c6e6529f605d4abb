"""What each of several processes runs: a trainer with DistributedDataParallel and one with zero.shard."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from trainer_runs import Texts, arguments, build_model, logged
from training_harness import config_for

import zero
from gemini import ConfigError, GeminiConfig, GeminiDDP
from gemini.integrations.transformers import GeminiTrainer, GeminiTrainerMixin


class ShardedTrainer(GeminiTrainerMixin, transformers.Trainer):
    def build_engine(self, model: Any, config: GeminiConfig) -> GeminiDDP:
        return zero.shard(model, config)


def run(kind: type, directory: Path, resume: Path | None = None, **fields: Any) -> Any:
    given = arguments(directory, per_device_train_batch_size=2, ddp_backend="gloo", save_strategy="steps", save_steps=3)
    trainer = kind(build_model("gpt2"), given, train_dataset=Texts(), eval_dataset=Texts(1), **fields)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def refusal(directory: Path) -> str:
    """Return what is said where each rank would train a model of its own."""
    trainer = GeminiTrainer(build_model("gpt2"), arguments(directory), train_dataset=Texts(), gemini=config_for("host"))
    try:
        trainer.train()
    except ConfigError as error:
        return str(error)
    finally:
        trainer.engine.close()
    return ""


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    expected = run(transformers.Trainer, directory / "plain")
    (directory / "swap").mkdir(exist_ok=True)
    gemini = config_for("nvme", directory / "swap")
    found = run(ShardedTrainer, directory / "gemini", gemini=gemini)
    found.save_model(str(directory / "model"))
    found.engine.close()
    resumed = run(ShardedTrainer, directory / "gemini", directory / "gemini" / "checkpoint-3", gemini=gemini)
    opened = transformers.AutoModelForCausalLM.from_pretrained(directory / "model")
    is_same = all(
        torch.equal(weight, opened.state_dict()[name]) for name, weight in resumed.engine.state_dict().items()
    )
    evaluated = [expected.evaluate()["eval_loss"], resumed.evaluate()["eval_loss"]]
    resumed.engine.close()
    said = refusal(directory)
    if expected.args.process_index == 0:
        curves = {
            key: [logged(each, key) for each in (expected, found, resumed)]
            for key in ("loss", "grad_norm", "learning_rate")
        }
        summary = {**curves, "is_same": is_same, "eval_loss": evaluated, "refusal": said}
        (directory / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
