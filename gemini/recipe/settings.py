"""The settings of a training file, their defaults and their descriptions.

The descriptions below are the documentation: `python -m gemini init` writes them into the file that it makes. Each
value is checked here alone; the code that uses values checks whether they fit each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gemini.config import parse_endurance
from gemini.errors import ConfigError
from gemini.tiers import parse_nbytes

__all__ = [
    "DataSettings",
    "LoraSettings",
    "MemorySettings",
    "ModelSettings",
    "NvmeSettings",
    "OutputSettings",
    "TrainingSettings",
    "Settings",
    "section_in",
]


def _check_nbytes(size: Any) -> Any:
    with _as_value_error("size"):
        parse_nbytes(size, name="size")
    return size


def _check_endurance(endurance: str) -> str:
    with _as_value_error("NVMeConfig.endurance"):
        parse_endurance(endurance)
    return endurance


@contextmanager
def _as_value_error(name: str) -> Iterator[None]:
    """Report an invalid value through pydantic, which adds the setting's name."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(str(error).removeprefix(f"{name}: ")) from None


def _check_device(device: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise ValueError('expected "cpu", "cuda" or one of several, such as "cuda:1"')
    return device


NBytes = Annotated[str | int, BeforeValidator(_check_nbytes)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[float, Field(ge=0, lt=1)]


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of a setting's type, optional or not; None if the setting is a plain value."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_what_is_easily_meant_otherwise(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true as a number, and an empty name as the current directory."""
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("expected a value, not true or false")
        if value == "":
            raise ValueError("is empty: write a value, or remove it")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, values: Any) -> Any:
        """Use defaults where all settings of a section are commented out; refuse an empty optional section."""
        empty = [name for name in cls.model_fields if isinstance(values, dict) and values.get(name, "") is None]
        for name in empty:
            annotation = cls.model_fields[name].annotation
            if section_in(annotation) is not None and section_in(annotation) is not annotation:
                raise ValueError(f"{name} is empty: write {name}: {{}} to have its defaults, or remove it")
        return {**values, **{n: {} for n in empty if section_in(cls.model_fields[n].annotation)}} if empty else values


class LoraSettings(_Section):
    """Adapters of peft: the model's own weights stay frozen."""

    rank: Count = Field(16, description="rank of each adapter")
    alpha: Count = Field(32, description="adapters are scaled by alpha / rank")
    dropout: Share = Field(0.0, description="dropout probability of the adapters' inputs")
    target_modules: str | list[str] = Field(
        "all-linear", description='names of modules, or "all-linear" for all linear layers except the output layer'
    )


class ModelSettings(_Section):
    """The model to train."""

    path: str | None = Field(
        None, description="directory of a Hugging Face model (weights, config.json, tokenizer), or its name on the hub"
    )
    config: str | None = Field(
        None, description="instead of path: a config.json or a directory with one, to start from random weights"
    )
    tokenizer: str | None = Field(None, description="directory of the tokenizer, if it is not in the model's directory")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="dtype of the working weights; auto: bf16 if this machine computes it as fast as fp32"
    )
    lora: LoraSettings | None = Field(None, description="LoRA adapters; without this section, all weights are trained")

    @model_validator(mode="after")
    def _check_source(self) -> ModelSettings:
        if (self.path is None) is (self.config is None):
            raise ValueError("expected either path or config")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("tokenizer: expected a directory with it, because config has none")
        return self


class DataSettings(_Section):
    """The training data."""

    files: list[str] = Field(
        min_length=1,
        description="text, JSON lines or parquet (.txt .md .json .jsonl .parquet), all of one kind; may have wildcards",
    )
    eval_files: list[str] = Field([], description="files for evaluation, in the same form")
    form: Literal["auto", "text", "messages", "instruction", "completion"] = Field(
        "auto",
        description="columns of the data: text; messages (of {role, content}); instruction, output, input; or prompt, "
        "completion. auto: detected from their names",
    )
    sequence_length: Annotated[int, Field(ge=2, lt=2**31)] = Field(1024, description="tokens of a row")
    packing: bool = Field(True, description="concatenate examples and cut them into full rows, without padding")
    train_on_prompts: bool = Field(False, description="also compute the loss on prompts and users' messages")


class NvmeSettings(_Section):
    """A disk tier."""

    path: Path = Field(description="directory of the swap file, on a fast drive")
    budget: NBytes = Field(description="maximum size of the swap file")
    verify: bool = Field(False, description="verify everything read back with a CRC-32C")
    endurance: Annotated[str, AfterValidator(_check_endurance)] | None = Field(
        None, description='rated endurance of the drive, such as "600 TBW"'
    )


class MemorySettings(_Section):
    """The memory that the engine may use."""

    device: Annotated[str, AfterValidator(_check_device)] | None = Field(
        None, description='"cuda" or "cpu"; default: cuda if there is one'
    )
    device_budget: NBytes | None = Field(
        None, description='GPU memory for everything, such as "8GiB"; default: what is free'
    )
    host_budget: NBytes | None = Field(None, description="main memory for the engine; default: nearly all that is free")
    nvme: NvmeSettings | None = Field(None, description="disk for weights and state that do not fit into memory")
    service: str | None = Field(
        None,
        description='memory service that grants the memory, such as "unix:/run/gemini.sock"; default: $GEMINI_SERVICE',
    )
    job: str | None = Field(None, description="name of this run in the service; default: the program and its process")
    activation_checkpointing: bool = Field(
        True, description="keep only the input of each block, and recompute the block in backward"
    )


class TrainingSettings(_Section):
    """The settings of training."""

    steps: Count | None = Field(None, description="number of optimizer steps; default: as many as `epochs` needs")
    epochs: float = Field(1.0, gt=0, description="number of passes over the data")
    batch_size: Count = Field(1, description="rows per forward and backward")
    gradient_accumulation: Count = Field(1, description="forwards and backwards per optimizer step")
    learning_rate: float = Field(2e-5, gt=0, description="at its highest")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="how it changes"
    )
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="steps in which the learning rate rises to its value"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW; not applied to norms and biases")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam's")
    max_grad_norm: float = Field(1.0, ge=0, description="maximum gradient norm, by clipping; 0: no clipping")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the order of the data and of random initial weights")


class OutputSettings(_Section):
    """The files that a run writes."""

    path: Path = Field(description="directory: checkpoints, the log and the trained model")
    save_steps: Count | None = Field(
        None, description="steps between checkpoints; default: save only when a signal ends the run"
    )
    keep_last: Count = Field(2, description="checkpoints to keep")
    log_steps: Count = Field(1, description="log every so many steps")
    eval_steps: Count | None = Field(None, description="steps between evaluations; default: evaluate at the end")
    record: bool = Field(
        True, description="record the run for `python -m gemini report`, with every move of three steps"
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        [], description="loggers besides log.csv: tensorboard, wandb, trackio, mlflow, if they are installed"
    )


class Settings(_Section):
    """A whole training file."""

    model: ModelSettings = Field(description="what is trained")
    data: DataSettings = Field(description="what it is trained on")
    memory: MemorySettings = Field(MemorySettings(), description="memory that the run may use")
    training: TrainingSettings = Field(TrainingSettings(), description="how it is trained")
    output: OutputSettings = Field(description="what is kept")
