"""One training run from its settings: model, data and memory come together in Hugging Face's Trainer."""

from __future__ import annotations

import signal
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers.trainer_utils import get_last_checkpoint

from gemini.config import GeminiConfig, NVMeConfig
from gemini.ddp import GeminiDDP
from gemini.errors import ConfigError, ModelError
from gemini.integrations.transformers import GeminiTrainer
from gemini.nn import use_sliced_loss
from gemini.recipe.data import Collator, load_rows
from gemini.recipe.dtype import choose_dtype
from gemini.recipe.progress import ProgressCallback
from gemini.recipe.settings import LoraSettings, MemorySettings, ModelSettings, Settings
from gemini.report import MemoryReport
from gemini.signals import StopOnSignals

__all__ = ["FinishedRun", "train"]

MODEL_NAME = "model"
"""Directory of the trained model, in the output directory."""
RECORDING_NAME = "recording"
"""Directory of what `python -m gemini report` shows, in the output directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """How a run ended."""

    path: Path
    """What was saved last: the trained model, or a checkpoint if a signal has ended the run."""
    recording: Path | None
    stopped_by: signal.Signals | None
    loss: float | None
    """The last that was logged."""
    report: MemoryReport


def train(settings: Settings, *, resume: bool, console: Console) -> FinishedRun:
    """Train; everything that can be checked is, before weights are read.

    Args:
        settings: what, on what, how, where.
        resume: whether to go on from the last checkpoint in the output directory.
        console: shows how it goes.

    Returns:
        How it ended.

    Raises:
        ConfigError: settings do not fit one another, the files or the machine.
        GeminiError: see GeminiDDP and GeminiDDP.load_checkpoint.
    """
    checkpoint = _find_checkpoint(settings.output.path, resume=resume)
    source = _find_model(settings.model)
    device = torch.device(settings.memory.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, reason = choose_dtype(settings.model.dtype, device)
    console.print(f"Working weights on {device}: {reason}")
    tokenizer = _read_tokenizer(settings.model, source)
    rows = load_rows(settings.data.files, settings.data, tokenizer, name="data.files")
    eval_rows = None
    if settings.data.eval_files:
        eval_rows = load_rows(settings.data.eval_files, settings.data, tokenizer, name="data.eval_files")
    console.print(f"{len(rows):,} rows of up to {settings.data.sequence_length:,} tokens")
    model = _build_model(settings.model, source, num_tokens=len(tokenizer))
    if settings.memory.activation_checkpointing:
        # The second name is the one before transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    transformers.set_seed(settings.training.seed)
    collator = Collator(pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    with ExitStack() as stack:
        progress = stack.enter_context(ProgressCallback(settings.output.path / "log.csv", console))
        trainer = _Trainer(
            stack,
            source if settings.model.path is not None else None,
            progress,
            model=model,
            args=_training_arguments(settings, has_eval=eval_rows is not None, on_cpu=device.type == "cpu"),
            gemini=_engine_config(settings, device, dtype),
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[progress],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        engine = trainer.built_engine()
        recording = settings.output.path / RECORDING_NAME
        recorder = stack.enter_context(engine.record(recording)) if settings.output.record else None
        progress.follow(engine, recorder)
        stop = stack.enter_context(StopOnSignals(engine))
        trainer.add_callback(_StopCallback(stop))
        trainer.train(resume_from_checkpoint=checkpoint)
        path = settings.output.path / MODEL_NAME
        if stop.received is None:
            trainer.save_model(str(path))
        else:
            path = Path(str(_last_checkpoint(settings.output.path)))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return FinishedRun(
            path=path,
            recording=recording if recorder is not None else None,
            stopped_by=stop.received,
            loss=losses[-1] if losses else None,
            report=engine.memory_report(),
        )


class _Trainer(GeminiTrainer):
    """Builds its engine from a directory's weights, and leaves the end of it to a stack."""

    def __init__(self, stack: ExitStack, weights: Path | None, progress: ProgressCallback, **kwargs: Any) -> None:
        self._stack = stack
        self._weights = weights
        self._progress = progress
        super().__init__(**kwargs)

    def build_engine(self, model: Any, config: GeminiConfig) -> GeminiDDP:
        """Build the engine."""
        return self._stack.enter_context(GeminiDDP(model, config, weights=self._weights))

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count a batch, and train on it."""
        self._progress.count(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss


class _StopCallback(transformers.TrainerCallback):
    """Saves and ends after the step in which a signal came."""

    def __init__(self, stop: StopOnSignals) -> None:
        self._stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for a signal."""
        if self._stop.should_stop():
            control.should_save = control.should_training_stop = True


def _find_checkpoint(path: Path, *, resume: bool) -> str | None:
    """Return the checkpoint to go on from, None for a new run."""
    found = _last_checkpoint(path) if path.is_dir() else None
    if resume and found is None:
        raise ConfigError(f"--resume: there is no checkpoint in {path}; start without it")
    if found is not None and not resume:
        raise ConfigError(
            f"output.path: {path} has the checkpoints of a run: go on with it by --resume, or name another directory"
        )
    path.mkdir(parents=True, exist_ok=True)
    return found


def _last_checkpoint(path: Path) -> str | None:
    """Return the checkpoint of the highest step in a directory."""
    found: str | None = get_last_checkpoint(str(path))  # type: ignore[no-untyped-call]
    return found


def _find_model(settings: ModelSettings) -> Path:
    """Return the model's directory, or config.json; a name of the hub is downloaded."""
    source = settings.path or settings.config
    assert source is not None
    name = "model.path" if settings.path is not None else "model.config"
    local = Path(source).expanduser()
    if local.exists():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"]))
    except Exception as error:  # of many types, from the network's to the name's
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{name}: there is no directory {source}, and the hub has no such model here: {first}"
        ) from error


def _read_tokenizer(settings: ModelSettings, source: Path) -> Any:
    directory = source if settings.tokenizer is None else Path(settings.tokenizer).expanduser()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"model.tokenizer: {directory}: expected a directory with a tokenizer: {first}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.tokenizer: {directory}: expected a tokenizer with an end-of-sequence token")
    return tokenizer


def _build_model(settings: ModelSettings, source: Path, *, num_tokens: int) -> Any:
    """Describe the model without giving it memory."""
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"model: {source}: expected a causal language model's configuration: {first}") from error
    if num_tokens > config.vocab_size:
        raise ConfigError(
            f"model.tokenizer: it has {num_tokens} tokens, the model {config.vocab_size}: take the model's own"
        )
    model.config.use_cache = False
    model.loss_type = model.loss_type or "ForCausalLM"  # None where the class's name does not tell; it would warn
    with suppress(ModelError):  # its output layer is of another kind: its own loss serves
        use_sliced_loss(model)
    return model if settings.lora is None else _add_adapters(model, settings.lora)


def _add_adapters(model: Any, settings: LoraSettings) -> Any:
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from error
    adapted.enable_input_require_grads()  # whose gradients activation checkpointing needs
    return adapted


def _engine_config(settings: Settings, device: torch.device, dtype: torch.dtype) -> GeminiConfig:
    memory: MemorySettings = settings.memory
    nvme = None
    if memory.nvme is not None:
        memory.nvme.path.mkdir(parents=True, exist_ok=True)
        nvme = NVMeConfig(
            path=memory.nvme.path,
            budget=memory.nvme.budget,
            verify=memory.nvme.verify,
            endurance=memory.nvme.endurance,
        )
    return GeminiConfig(
        device=device,
        dtype=dtype,
        device_budget=memory.device_budget if device.type != "cpu" else None,
        host_budget=memory.host_budget,
        nvme=nvme,
        gradient_accumulation=settings.training.gradient_accumulation > 1,
        seed=settings.training.seed,
    )


def _training_arguments(settings: Settings, *, has_eval: bool, on_cpu: bool) -> transformers.TrainingArguments:
    training, output = settings.training, settings.output
    return transformers.TrainingArguments(
        output_dir=str(output.path),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        logging_steps=output.log_steps,
        save_strategy="no" if output.save_steps is None else "steps",
        save_steps=output.save_steps or 1,
        save_total_limit=output.keep_last,
        eval_strategy="no" if not has_eval else "epoch" if output.eval_steps is None else "steps",
        eval_steps=output.eval_steps,
        report_to=list(output.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
    )
