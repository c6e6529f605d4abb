"""Hugging Face's Trainer over an engine trains, logs, saves and resumes as the plain one does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainer_runs import Texts, arguments, build_model, is_close, logged
from training_harness import config_for, distance, same_bits

from gemini import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    GeminiConfig,
    GeminiDDP,
    ModelError,
)
from gemini.integrations.transformers import GeminiTrainer, GeminiTrainerMixin, config_for_arguments

pytest.importorskip("transformers", minversion="5.23", reason="GeminiTrainer was made for transformers 5.23")


@pytest.fixture
def close_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close every engine that a trainer of the test has built."""
    built: list[GeminiTrainerMixin] = []
    original = GeminiTrainerMixin.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        built.append(self)

    monkeypatch.setattr(GeminiTrainerMixin, "__init__", remember)
    yield
    for trainer in built:
        if trainer.engine is not None:
            trainer.engine.close()


pytestmark = pytest.mark.usefixtures("close_engines")


def gemini_trainer(directory: Path, gemini: GeminiConfig | None = None, model: Any = None, **fields: Any) -> Any:
    gemini = gemini or config_for("nvme", directory)
    model = model or build_model()
    return GeminiTrainer(
        model, arguments(directory, **fields), train_dataset=Texts(), eval_dataset=Texts(1), gemini=gemini
    )


def plain_trainer(directory: Path, model: Any = None, **fields: Any) -> Any:
    return transformers.Trainer(
        model or build_model(), arguments(directory, **fields), train_dataset=Texts(), eval_dataset=Texts(1)
    )


# ---------------------------------------------------------------- training


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("place", "fields"),
    [
        ("nvme", {"eval_strategy": "steps", "eval_steps": 2}),
        ("mixed", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ("nvme", {"activation_checkpointing": True, "max_grad_norm": 0.0}),
    ],
    ids=["evaluation", "accumulation", "checkpointing, no clipping"],
)
def test_curves_are_the_plain_trainers(tmp_path: Path, place: str, fields: dict[str, Any]) -> None:
    expected = plain_trainer(tmp_path, **fields)
    expected.train()
    found = gemini_trainer(tmp_path, config_for(place, tmp_path), **fields)
    found.train()
    assert logged(found, "loss")[0] == logged(expected, "loss")[0]
    for key in ("loss", "grad_norm", "eval_loss"):
        if key != "eval_loss" or "eval_steps" in fields:
            assert is_close(logged(found, key), logged(expected, key)), key
    assert logged(found, "learning_rate") == logged(expected, "learning_rate")
    assert distance(found.engine.master_state_dict(), expected.model.state_dict()) < 1e-6
    report = found.engine.memory_report()
    assert report.num_fetches > 0
    assert report.nvme_read_nbytes > 0


def test_evaluation_and_prediction_need_no_training(tmp_path: Path) -> None:
    found, expected = gemini_trainer(tmp_path), plain_trainer(tmp_path)
    assert found.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]
    assert (found.predict(Texts(1)).predictions[0] == expected.predict(Texts(1)).predictions[0]).all()


def test_a_second_training_goes_on_with_the_same_engine(tmp_path: Path) -> None:
    expected = plain_trainer(tmp_path, max_steps=2)
    expected.train()
    expected.train()
    found = gemini_trainer(tmp_path, max_steps=2)
    found.train()
    engine = found.engine
    found.train()
    assert found.engine is engine
    assert is_close(logged(found, "loss"), logged(expected, "loss"))


def test_an_optimizer_made_before_training_is_used(tmp_path: Path) -> None:
    trainer = gemini_trainer(tmp_path, max_steps=1, warmup_steps=0)
    optimizer = trainer.create_optimizer()
    trainer.train()
    assert optimizer.last_grad_norm is not None


def test_model_init_gives_each_training_an_engine_of_its_own(tmp_path: Path) -> None:
    fields = arguments(tmp_path, max_steps=2)
    gemini = config_for("nvme", tmp_path)
    trainer = GeminiTrainer(args=fields, train_dataset=Texts(), model_init=lambda: build_model(), gemini=gemini)
    trainer.train()
    first, losses = trainer.engine, logged(trainer, "loss")
    trainer.train()
    assert trainer.engine is not first
    assert logged(trainer, "loss") == losses


# ---------------------------------------------------------------- saving and resuming


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    # Without it the order of the data is drawn from torch's own generator, after the checkpoint has been loaded.
    order = {"accelerator_config": {"use_seedable_sampler": False}}
    (tmp_path / "swap").mkdir()
    swapped = config_for("mixed", tmp_path / "swap")
    whole = gemini_trainer(tmp_path / "whole", config_for("host"), **order)
    whole.train()
    part = gemini_trainer(tmp_path / "part", swapped, save_strategy="steps", save_steps=3, **order)
    part.train()
    part.engine.close()
    resumed = gemini_trainer(tmp_path / "part", swapped, **order)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
    assert same_bits(resumed.engine.master_state_dict(), whole.engine.master_state_dict())


def test_an_incomplete_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    """Without the file that is written last the trainer would train from step 0 on, with the weights of step 3."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    first = gemini_trainer(tmp_path, max_steps=3, **saving)
    first.train()
    first.engine.close()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    named = gemini_trainer(tmp_path, max_steps=4)
    with pytest.raises(CheckpointError, match="checkpoint-3 is incomplete"):
        named.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    newest = gemini_trainer(tmp_path, max_steps=4)
    newest.train(resume_from_checkpoint=True)
    steps = [entry["step"] for entry in newest.state.log_history if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    assert newest.engine.memory_report().num_steps == 4


def test_no_checkpoint_to_go_on_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no complete checkpoint in"):
        gemini_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_checkpoints_have_no_file_of_the_optimizer(tmp_path: Path) -> None:
    trainer = gemini_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    files = sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir())
    assert files == [
        "config.json",
        "gemini",
        "generation_config.json",
        "model.safetensors",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    ]


def test_a_plain_trainers_checkpoint_can_be_gone_on_from(tmp_path: Path) -> None:
    plain = plain_trainer(tmp_path, save_strategy="steps", save_steps=3)
    plain.train()
    found = gemini_trainer(tmp_path)
    found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert is_close(logged(found, "loss"), logged(plain, "loss"))
    assert distance(found.engine.master_state_dict(), plain.model.state_dict()) < 1e-6


def test_a_plain_checkpoint_comes_too_late_for_a_model_in_use(tmp_path: Path) -> None:
    plain = plain_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    plain.train()
    found = gemini_trainer(tmp_path)
    found.evaluate()
    with pytest.raises(CheckpointMismatchError, match="has no gemini directory"):
        found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_save_model_writes_what_from_pretrained_opens(tmp_path: Path) -> None:
    trainer = gemini_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert same_bits(dict(found), dict(trainer.engine.state_dict()))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    # The first step has a learning rate of 0, the others one that makes the loss worse.
    fields: dict[str, Any] = {"learning_rate": 0.5, "warmup_steps": 2, "max_steps": 3, "save_total_limit": 1}
    strategies = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = gemini_trainer(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **fields, **strategies
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses.index(min(losses)) == 0
    assert trainer.evaluate()["eval_loss"] == min(losses)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # peft's calls
def test_adapters_train_and_resume_and_are_saved_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def build() -> Any:
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(build_model("llama"), lora)

    expected = plain_trainer(tmp_path / "plain", build())
    expected.train()
    found = gemini_trainer(
        tmp_path / "gemini", config_for("nvme", tmp_path), build(), save_strategy="steps", save_steps=3
    )
    found.train()
    found.engine.close()
    resumed = gemini_trainer(tmp_path / "gemini", config_for("nvme", tmp_path), build())
    resumed.train(resume_from_checkpoint=str(tmp_path / "gemini" / "checkpoint-3"))
    assert is_close(logged(found, "loss"), logged(expected, "loss"))
    assert logged(resumed, "loss") == logged(found, "loss")
    checkpoint = tmp_path / "gemini" / "checkpoint-6"
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 150_000
    opened = peft.PeftModel.from_pretrained(build_model("llama"), checkpoint)
    assert same_bits(dict(opened.state_dict()), dict(resumed.engine.state_dict()))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bf16": True}, "TrainingArguments.bf16: expected GeminiConfig.dtype, which is torch.float32"),
        ({"torch_compile": True}, "block.compile()"),
        ({"optim": "adafactor"}, "expected one of adamw_torch"),
        ({"bf16_full_eval": True}, "TrainingArguments.bf16_full_eval"),
        ({"auto_find_batch_size": True}, "TrainingArguments.auto_find_batch_size"),
        ({"load_best_model_at_end": True, "save_only_model": True}, "TrainingArguments.save_only_model"),
    ],
)
def test_arguments_that_an_engine_cannot_honour_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        gemini_trainer(tmp_path, **fields)


def test_gradients_must_be_accumulated_exactly(tmp_path: Path) -> None:
    gemini = config_for("nvme", tmp_path, gradient_accumulation=False)
    with pytest.raises(ConfigError, match="GeminiConfig.gradient_accumulation: expected True"):
        gemini_trainer(tmp_path, gemini, gradient_accumulation_steps=2)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = build_model()
    given = (torch.optim.AdamW(model.parameters()), None)
    trainer = GeminiTrainer(model, arguments(tmp_path), train_dataset=Texts(), optimizers=given)
    with pytest.raises(ConfigError, match="optimizers: expected none"):
        trainer.train()


@pytest.mark.parametrize(
    ("fields", "dtype"), [({"bf16": True}, torch.bfloat16), ({}, torch.float32)], ids=["bf16", "neither"]
)
def test_flags_choose_the_dtype_where_no_configuration_does(
    tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    config = config_for_arguments(None, arguments(tmp_path, **fields))
    assert (config.dtype, config.gradient_accumulation, config.device) == (dtype, False, torch.device("cpu"))


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_is_the_engines_and_not_autocasts(tmp_path: Path, flag: str, dtype: torch.dtype) -> None:
    plain = plain_trainer(tmp_path, max_steps=1)
    plain.train()
    found = gemini_trainer(tmp_path, config_for("nvme", tmp_path, dtype=dtype), max_steps=1, **{flag: True})
    found.train()
    assert found.accelerator.mixed_precision == "no"
    assert found.engine.state_dict()["lm_head.weight"].dtype == dtype
    for key in ("loss", "grad_norm"):  # of float16, without the loss scale
        assert logged(found, key) == pytest.approx(logged(plain, key), rel=0.02)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("place", ["host", "nvme", "mixed"])
def test_a_second_trainer_goes_on_from_the_first_ones_model(tmp_path: Path, place: str) -> None:
    def train_twice(kind: Any, **fields: Any) -> list[float]:
        model = build_model()
        given = arguments(tmp_path, max_steps=2, warmup_steps=0)
        first = kind(model, given, train_dataset=Texts(), **fields)
        first.train()
        second = kind(model, given, train_dataset=Texts(1), **fields)
        second.train()
        return [*logged(first, "loss"), *logged(second, "loss"), first.evaluate(Texts(2))["eval_loss"]]

    found = train_twice(GeminiTrainer, gemini=config_for(place, tmp_path))
    assert is_close(found, train_twice(transformers.Trainer))


def test_an_engine_of_the_users_own_is_not_closed_for_a_trainer(tmp_path: Path) -> None:
    model = build_model()
    with GeminiDDP(model, config_for("host")) as engine:
        with pytest.raises(ModelError, match="is managed by another GeminiDDP"):
            gemini_trainer(tmp_path, model=model).train()
        assert engine.state_dict().keys() == build_model().state_dict().keys()
