"""Hugging Face's Trainer, and trainers derived from it, over a GeminiDDP.

[Note: Where the engine stands]
The trainer's `model` stays the user's model, which callbacks, saving and evaluation use. The engine is the trainer's
`model_wrapped`, as torch's DistributedDataParallel would be. It is built when training or evaluation begins, so earlier
changes of the trainer to its model (adapters, special tokens, activation checkpointing, a patched output layer) apply
to a plain model.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gemini.checkpoint import has_checkpoint
from gemini.config import GeminiConfig
from gemini.ddp import GeminiDDP
from gemini.errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    MissingCheckpointError,
    MissingLibraryError,
)
from gemini.integrations import overrides
from gemini.integrations.accelerate import GeminiAccelerator
from gemini.integrations.random_numbers import unchanged_random_numbers
from gemini.integrations.successive import leave, owns, take_over
from gemini.optimizer import HybridAdam
from gemini.pretrained import showing_weights

try:
    import transformers
    from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.training_args import OptimizerNames
except ImportError as error:
    raise MissingLibraryError(f"{__name__} needs transformers (pip install transformers): {error}") from error

__all__ = ["GeminiTrainer", "GeminiTrainerMixin", "config_for_arguments", "last_complete_checkpoint"]

logger = logging.getLogger(__name__)

_CHECKPOINT_NAME = "gemini"

_ADAMW_NAMES = (OptimizerNames.ADAMW_TORCH.value, OptimizerNames.ADAMW_TORCH_FUSED.value)

_REFUSED_ARGUMENTS = {
    "deepspeed": "GeminiConfig sets the memory to use; GeminiConfig.from_deepspeed reads a DeepSpeed file",
    "fsdp": "the engine places and moves the weights itself",
    "torch_compile": "compile the blocks of the model instead: for block in model.model.layers: block.compile()",
    "fp16_full_eval": "evaluation uses the engine's working weights: choose GeminiConfig(dtype=...)",
    "bf16_full_eval": "evaluation uses the engine's working weights: choose GeminiConfig(dtype=...)",
    "auto_find_batch_size": "budgets keep weights and state from running out of memory; choose a batch size",
    "optim_args": "HybridAdam takes learning_rate, adam_beta1, adam_beta2, adam_epsilon and weight_decay",
}
"""TrainingArguments that are not supported, with the alternative for each."""


def config_for_arguments(config: GeminiConfig | None, arguments: Any) -> GeminiConfig:
    """Return the engine's configuration for a trainer's arguments.

    Args:
        config: the user's configuration; None: the dtype that `bf16` or `fp16` name, else float32.
        arguments: transformers.TrainingArguments.

    Returns:
        The user's configuration, on the trainer's device if it names none.

    Raises:
        ConfigError: the two contradict each other, or the arguments ask for something that an engine cannot do.
    """
    for name, remedy in _REFUSED_ARGUMENTS.items():
        if getattr(arguments, name, None):
            raise ConfigError(f"TrainingArguments.{name}: not with a GeminiDDP: {remedy}")
    if arguments.optim not in _ADAMW_NAMES:
        raise ConfigError(
            f"TrainingArguments.optim: expected one of {', '.join(_ADAMW_NAMES)}, which HybridAdam replaces, got "
            f"{str(arguments.optim)!r}"
        )
    if arguments.load_best_model_at_end and arguments.save_only_model:
        raise ConfigError(
            "TrainingArguments.save_only_model: not with load_best_model_at_end, which reads the engine's checkpoint"
        )
    flag = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else None
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[flag]
    accumulates = arguments.gradient_accumulation_steps > 1
    if config is None:
        return GeminiConfig(dtype=wanted or torch.float32, gradient_accumulation=accumulates, device=arguments.device)
    if wanted not in (None, config.dtype):
        raise ConfigError(
            f"TrainingArguments.{flag}: expected GeminiConfig.dtype, which is {config.dtype}: pass {flag}=False, "
            f"or GeminiConfig(dtype={wanted})"
        )
    if accumulates and not config.gradient_accumulation:
        raise ConfigError(
            "GeminiConfig.gradient_accumulation: expected True, because TrainingArguments.gradient_accumulation_steps "
            f"is {arguments.gradient_accumulation_steps}"
        )
    if config.device is None:
        return replace(config, device=arguments.device)
    return config


def last_complete_checkpoint(directory: Path) -> Path | None:
    """Find the newest complete `checkpoint-N` of a GeminiTrainer.

    A trainer writes file by file. If the process is killed meanwhile, the directory lacks the last files, and a resumed
    run would continue with its weights from step 0.

    Args:
        directory: the trainer's `output_dir`.

    Returns:
        The checkpoint's directory; None if there is none. Newer incomplete ones are named in a warning.

    Raises:
        OffloadIOError: a directory cannot be read.
    """
    if not directory.is_dir():
        return None
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    numbers = {path: path.name.removeprefix(prefix) for path in directory.glob(f"{prefix}*")}
    for path in sorted(
        (path for path, number in numbers.items() if number.isdecimal()), key=lambda p: -int(numbers[p])
    ):
        if _is_complete(path):
            return path
        logger.warning("%s is incomplete, because its save was interrupted, and is ignored", path)
    return None


def _is_complete(checkpoint: Path) -> bool:
    place = checkpoint / _CHECKPOINT_NAME
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the file that a trainer writes last
    except (OSError, ValueError):
        return False
    return not place.is_dir() or has_checkpoint(place)


class GeminiTrainerMixin:
    """Makes a trainer train through a GeminiDDP: `class Trainer(GeminiTrainerMixin, transformers.Trainer)`.

    The rest of the script stays unchanged. AdamW is HybridAdam, with the trainer's parameter groups, learning rates and
    clipping; a checkpoint contains the engine's, streamed, in place of the optimizer's file. With several processes,
    override `build_engine` to return `zero.shard(model, config)`.

    Args:
        *args: as in the trainer.
        gemini: budgets and choices; None: chosen from the trainer's arguments.
        **kwargs: as in the trainer.

    Attributes:
        engine: built when training or evaluation begins; None before. Its `close()` frees memory and disk.

    Raises:
        ConfigError: the trainer's arguments ask for something that an engine cannot do, or contradict `gemini`.
    """

    engine: GeminiDDP | None = None
    accelerator: Any
    args: Any
    data_collator: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any
    state: Any

    def __init__(self, *args: Any, gemini: GeminiConfig | None = None, **kwargs: Any) -> None:
        if gemini is not None and not isinstance(gemini, GeminiConfig):
            raise ConfigError(f"GeminiTrainer: gemini: expected a GeminiConfig or None, got {gemini!r}")
        self._gemini = gemini
        super().__init__(*args, **kwargs)

    # ---------------------------------------------------------------- preparing

    def create_accelerator_and_postprocess(self) -> None:
        """Build the accelerator after checking that the arguments allow an engine."""
        self._gemini = config_for_arguments(self._gemini, self.args)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator.__class__ = GeminiAccelerator  # the trainer names the class itself; this one adds no state
        self.args._n_gpu = 1  # more would mean torch.nn.DataParallel

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Prevent casts by accelerate: `bf16` and `fp16` set the engine's dtype."""
        arguments: dict[str, Any] = super()._build_accelerator_args(**kwargs)  # type: ignore[misc]
        return arguments | {"mixed_precision": "no"}

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Leave the model where it is; the engine moves it."""

    def build_engine(self, model: Any, config: GeminiConfig) -> GeminiDDP:
        """Wrap the model; override this where a GeminiDDP is made in another way.

        Args:
            model: the trainer's model when training or evaluation begins.
            config: the configuration from `gemini` and the trainer's arguments.

        Returns:
            The engine.
        """
        return GeminiDDP(model, config)

    def built_engine(self) -> GeminiDDP:
        """Return the engine of the trainer's model, a new one if the model is new.

        An engine that an earlier trainer left on the model is closed, and the model continues with its weights.
        """
        if self.engine is not None and self.engine.module is not self.model:  # model_init has made another one
            self.engine.close()
            self.engine = None
        if self.engine is not None and not owns(self.engine):  # a later trainer has taken over the model
            self.engine = None
        if self.engine is None:
            assert self._gemini is not None
            take_over(self.model)
            self.engine = self.build_engine(self.model, self._gemini)
            leave(self.engine)
        return self.engine

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Return the engine for training, and the model in it for evaluation."""
        engine = self.built_engine()
        return self.accelerator.prepare_model(engine) if training else self.model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build a HybridAdam over the trainer's parameter groups.

        Args:
            model: as in the trainer; ignored.

        Returns:
            The optimizer.

        Raises:
            ConfigError: the trainer was given another optimizer.
        """
        if self.optimizer is None and getattr(self, "optimizer_cls_and_kwargs", None) is None:
            self.built_engine()
        elif not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), HybridAdam):  # of an earlier train()
            raise ConfigError(
                "GeminiTrainer: optimizers: expected none: the trainer builds a HybridAdam over the engine's "
                "parameters from TrainingArguments; override create_scheduler to use your own scheduler"
            )
        optimizer: torch.optim.Optimizer = super().create_optimizer()  # type: ignore[misc]
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[type, dict[str, Any]]:
        """Return HybridAdam and its arguments.

        Args:
            args: transformers.TrainingArguments.
            model: ignored.

        Returns:
            As in the trainer.
        """
        betas = (args.adam_beta1, args.adam_beta2)
        return HybridAdam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}

    # ---------------------------------------------------------------- saving and loading

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does; `True` means its last complete checkpoint.

        Args:
            resume_from_checkpoint: as in the trainer.
            *args: as in the trainer.
            **kwargs: as in the trainer.

        Returns:
            As in the trainer.

        Raises:
            CheckpointError: the checkpoint is incomplete, or there is none.
        """
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(Path(self.args.output_dir))
            if found is None:
                raise MissingCheckpointError(
                    f"GeminiTrainer: there is no complete checkpoint in {self.args.output_dir}"
                )
            resume_from_checkpoint = str(found)
        if isinstance(resume_from_checkpoint, (str, Path)):
            path = Path(resume_from_checkpoint)
            if (path / _CHECKPOINT_NAME).is_dir() and not _is_complete(path):
                raise CheckpointError(
                    f"GeminiTrainer: {path} is incomplete, because its save was interrupted; resume from the last one"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write a directory that `from_pretrained` opens."""
        if self.engine is None or state_dict is not None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not hasattr(self.model, "save_pretrained") or self._has_own_save():
            with showing_weights(self.engine.runtime, self.model):
                super()._save(output_dir)  # type: ignore[misc]
            return
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.engine.save_pretrained(directory)
        if not self.args.should_save:
            return
        processor = getattr(self, "processing_class", None) or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(directory)
        torch.save(self.args, directory / TRAINING_ARGS_NAME)

    def _has_own_save(self) -> bool:
        """Return whether the trainer's class has its own way to save, as in sentence-transformers."""
        behind = type(self).__mro__[type(self).__mro__.index(GeminiTrainerMixin) + 1 :]
        owner = next(kind for kind in behind if "_save" in vars(kind))
        return owner.__module__ != transformers.trainer.__name__

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the engine's checkpoint, with the scheduler's state in it."""
        assert self.engine is not None
        self.engine.save_checkpoint(
            Path(output_dir) / _CHECKPOINT_NAME,
            scheduler=self.lr_scheduler,
            keep_last=1,
            frozen=not _has_adapters(self.model),
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Delay loading the engine's checkpoint until there is an engine; load a plain trainer's weights."""
        if (Path(resume_from_checkpoint) / _CHECKPOINT_NAME).is_dir():
            return
        if self.engine is not None:
            raise CheckpointMismatchError(
                f"GeminiTrainer: {resume_from_checkpoint} has no {_CHECKPOINT_NAME} directory: it was saved by "
                "another trainer, so it can be loaded only before anything is trained or evaluated"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the engine's checkpoint, or the AdamW state that a plain trainer saved."""
        if checkpoint is not None and (place := Path(checkpoint) / _CHECKPOINT_NAME).is_dir():
            assert self.engine is not None
            with unchanged_random_numbers():  # the trainer restores its own once it has drawn the order of the data
                self.engine.load_checkpoint(place, scheduler=self.lr_scheduler)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Load weights and moments of the best checkpoint."""
        assert self.engine is not None
        with unchanged_random_numbers():
            self.engine.load_checkpoint(Path(self.state.best_model_checkpoint) / _CHECKPOINT_NAME)


overrides.check_overrides(
    GeminiTrainerMixin, transformers.Trainer, added={"build_engine", "built_engine", "_has_own_save"}
)


class GeminiTrainer(GeminiTrainerMixin, transformers.Trainer):
    """transformers.Trainer over a GeminiDDP; see GeminiTrainerMixin."""


def _has_adapters(model: Any) -> bool:
    """Return whether a model is one of peft's, whose frozen weights are kept elsewhere."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
