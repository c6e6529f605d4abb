"""One training run: combines the model, data and memory of the settings in Hugging Face's Trainer."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers.integrations import integration_utils

from gemini.checkpoint.signals import StopOnSignals
from gemini.config import GeminiConfig, NVMeConfig
from gemini.ddp import GeminiDDP
from gemini.errors import ConfigError, naming_file
from gemini.integrations.overrides import check_overrides
from gemini.integrations.transformers import GeminiTrainer, last_complete_checkpoint
from gemini.observe.report import MemoryReport
from gemini.observe.run_recorder import RunRecorder
from gemini.placement.cost_model import HardwareProfile
from gemini.profile.recording import RECORDING_NAME
from gemini.recipe.data import Collator, load_rows
from gemini.recipe.dtype import DTYPES, choose_dtype
from gemini.recipe.forecast import Forecast, forecast_batch, predict_engine_step
from gemini.recipe.model import build_model, find_model, read_config, read_tokenizer, save_activation_memory
from gemini.recipe.output import LOG_NAME, MODEL_NAME, Start, claimed, find_start, keep_settings
from gemini.recipe.progress import ProgressCallback, Utilization
from gemini.recipe.settings import MemorySettings, Settings

__all__ = ["FinishedRun", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """The result of a run."""

    path: Path
    """Path of what was saved last: the trained model, or a checkpoint if a signal ended the run."""
    recording: Path | None
    """Path of the recording; None if nothing was recorded."""
    stopped_by: signal.Signals | None
    """Signal that ended the run; None if it was trained to its end."""
    loss: float | None
    """Last loss that was logged."""
    report: MemoryReport


def train(settings: Settings, *, resume: bool, console: Console, profile: HardwareProfile | None = None) -> FinishedRun:
    """Train, after checking everything that can be checked before weights are read.

    Args:
        settings: the settings of the training file.
        resume: whether to continue from the last complete checkpoint in the output directory.
        console: shows the progress.
        profile: this machine's rates, for MFU and predictions; None: they are not known.

    Returns:
        The result.

    Raises:
        ConfigError: settings do not fit each other, the files, the machine or the resumed run.
        GeminiError: see GeminiDDP and GeminiDDP.load_checkpoint.
    """
    _check_loggers(settings.output.report_to)
    with ExitStack() as stack:
        stack.enter_context(claimed(settings.output.path))
        start = find_start(settings, resume=resume)
        trainer = _build_trainer(settings, start, console, profile, stack)
        signals = stack.enter_context(StopOnSignals(trainer.built_engine()))
        stop = _StopCallback(signals)
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
        path = settings.output.path / MODEL_NAME
        if stop.stopped_by is None:
            trainer.save_model(str(path))
            signals.forget()
        else:
            found = last_complete_checkpoint(settings.output.path)
            assert found is not None, "the trainer has saved one"
            path = found
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return FinishedRun(
            path=path,
            recording=settings.output.path / RECORDING_NAME if trainer.progress.has_recorded else None,
            stopped_by=stop.stopped_by,
            loss=losses[-1] if losses else None,
            report=trainer.built_engine().memory_report(),
        )


def _build_trainer(
    settings: Settings, start: Start, console: Console, profile: HardwareProfile | None, stack: ExitStack
) -> _Trainer:
    """Read everything except the weights, then the weights; the stack closes what must be closed."""
    device = torch.device(settings.memory.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, reason = choose_dtype(start.dtype or settings.model.dtype, device)
    console.print(f"Working weights on {device}: {reason}")
    if device.type == "cpu" and settings.memory.device_budget is not None:
        console.print("memory.device_budget is not used, because forward and backward run on the processor")
    source = find_model(settings.model)
    model_config = read_config(source)
    tokenizer = read_tokenizer(settings.model, source)
    rows, eval_rows = _load_data(settings, tokenizer, console)
    length = settings.data.sequence_length
    model = build_model(settings.model, model_config, num_tokens=len(tokenizer), sequence_length=length)
    config = _engine_config(settings, device, dtype)
    forecast = forecast_batch(
        model,
        config,
        num_rows=settings.training.batch_size,
        sequence_length=length,
        save_memory=partial(save_activation_memory, model, has_checkpoints=settings.memory.activation_checkpointing),
    )
    transformers.set_seed(settings.training.seed)
    progress = ProgressCallback(
        settings.output.path / LOG_NAME, console, _utilization(forecast, profile, dtype, console)
    )
    trainer = _Trainer(
        stack,
        source if settings.model.path is not None else None,
        stack.enter_context(progress),
        model=model,
        args=_training_arguments(settings, has_eval=eval_rows is not None, on_cpu=device.type == "cpu"),
        gemini=config,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=Collator(
            pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ),
        processing_class=tokenizer,
        callbacks=[progress],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    engine = trainer.built_engine()
    _check_loaded(engine, source)
    if start.checkpoint is None:
        keep_settings(settings, dtype=next(name for name, known in DTYPES.items() if known is dtype))
    progress.follow(
        engine, partial(_record, engine, settings, forecast, profile, stack) if settings.output.record else None
    )
    return trainer


def _check_loaded(engine: GeminiDDP, source: Path) -> None:
    """Refuse weights that would stay random in a model to be fine-tuned."""
    missing = engine.loading_report.missing_keys if engine.loading_report is not None else ()
    if missing:
        raise ConfigError(
            f"model.path: {source} lacks {len(missing)} weights, for example {missing[0]}: expected all weights "
            "of the model in its config.json"
        )


def _check_loggers(names: list[Any]) -> None:
    known = integration_utils.get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in names:
        if name not in known:
            raise ConfigError(f"output.report_to: {name} is not installed: run pip install {name}, or leave it out")


def _load_data(settings: Settings, tokenizer: Any, console: Console) -> tuple[Any, Any]:
    """Return rows for training and, if there are files for it, rows for evaluation."""
    data = settings.data
    rows = load_rows(data.files, data, tokenizer, name="data.files")
    console.print(f"{len(rows):,} rows of up to {data.sequence_length:,} tokens")
    if not data.eval_files:
        return rows, None
    return rows, load_rows(data.eval_files, data, tokenizer, name="data.eval_files")


def _utilization(
    forecast: Forecast | None, profile: HardwareProfile | None, dtype: torch.dtype, console: Console
) -> Utilization | None:
    """Return the inputs of MFU; if they are not known, print how to get them."""
    peak = None if profile is None else profile.matrix_rates.get(str(dtype).removeprefix("torch."))
    if peak is None:
        console.print(
            "MFU is not shown, because this machine's peak rate is not known. Measure it once with python -m gemini "
            "bench"
        )
    elif forecast is None:
        console.print("MFU is not shown, because the model's operations cannot be counted before training")
    else:
        return Utilization(flops_per_token=forecast.flops_per_token, peak_flops_per_s=peak)
    return None


def _record(
    engine: GeminiDDP,
    settings: Settings,
    forecast: Forecast | None,
    profile: HardwareProfile | None,
    stack: ExitStack,
) -> RunRecorder:
    """Start a recording that includes what is expected of the run."""
    predicted = None
    if forecast is not None and profile is not None:
        num_batches = settings.training.gradient_accumulation
        predicted = predict_engine_step(engine, forecast, profile, num_batches=num_batches)
    recording = engine.record(
        settings.output.path / RECORDING_NAME,
        predicted=predicted,
        activation_nbytes=None if forecast is None else forecast.rehearsal.peak_nbytes,
    )
    return stack.enter_context(recording)


class _Trainer(GeminiTrainer):
    """Builds its engine from a directory's weights, and registers its end with a stack."""

    def __init__(self, stack: ExitStack, weights: Path | None, progress: ProgressCallback, **kwargs: Any) -> None:
        self._stack = stack
        self._weights = weights
        self.progress = progress
        super().__init__(**kwargs)

    def build_engine(self, model: Any, config: GeminiConfig) -> GeminiDDP:
        """Build the engine."""
        return self._stack.enter_context(GeminiDDP(model, config, weights=self._weights))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step in a resumed run that is complete: the trainer only checks after each step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count a batch and train on it."""
        self.progress.count(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss


check_overrides(_Trainer, transformers.Trainer, added={"build_engine"})


class _StopCallback(transformers.TrainerCallback):
    """Saves and ends after the step in which a signal came, unless that is the last step anyway."""

    def __init__(self, stop: StopOnSignals) -> None:
        self._stop = stop
        self.stopped_by: signal.Signals | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check for a signal."""
        if self._stop.should_stop() and state.global_step < state.max_steps:
            self.stopped_by = self._stop.received
            control.should_save = control.should_training_stop = True


check_overrides(_StopCallback, transformers.TrainerCallback)


def _engine_config(settings: Settings, device: torch.device, dtype: torch.dtype) -> GeminiConfig:
    memory: MemorySettings = settings.memory
    nvme = None
    if memory.nvme is not None:
        with naming_file("make the directory memory.nvme.path,", memory.nvme.path):
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
        service=memory.service,
        job=memory.job,
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
        logging_nan_inf_filter=False,
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
