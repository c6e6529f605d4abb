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
            raise ValueError("expected a value, not yes or no")
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
    dropout: Share = Field(0.0, description="share of the adapters' inputs that is dropped")
    target_modules: str | list[str] = Field(
        "all-linear", description='names of modules, or "all-linear": all but the output layer'
    )


class ModelSettings(_Section):
    """What is trained."""

    path: str | None = Field(
        None, description="directory of a Hugging Face model (weights, config.json, tokenizer), or its name on the hub"
    )
    config: str | None = Field(
        None, description="instead: a config.json, or a directory with one; starts from random weights"
    )
    tokenizer: str | None = Field(None, description="directory of a tokenizer, if it is not in the model's")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="working weights; auto: bf16 if this machine computes in it as fast as in fp32"
    )
    lora: LoraSettings | None = Field(None, description="adapters; without, all weights are trained")

    @model_validator(mode="after")
    def _check_source(self) -> ModelSettings:
        if (self.path is None) is (self.config is None):
            raise ValueError("expected either path or config")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("tokenizer: expected a directory with it, because config has none")
        return self


class DataSettings(_Section):
    """What it is trained on."""

    files: list[str] = Field(
        min_length=1,
        description="text, JSON lines or parquet (.txt .md .json .jsonl .parquet), all of one kind; may have wildcards",
    )
    eval_files: list[str] = Field([], description="for evaluation; of the same form")
    form: Literal["auto", "text", "messages", "instruction", "completion"] = Field(
        "auto",
        description="columns: text; messages (of {role, content}); instruction, output, input; or prompt, completion. "
        "auto: by their names",
    )
    sequence_length: Annotated[int, Field(ge=2, lt=2**31)] = Field(1024, description="tokens of a row")
    packing: bool = Field(True, description="put examples one after another and cut them into full rows; no padding")
    train_on_prompts: bool = Field(False, description="count the loss of prompts and users' messages too")


class NvmeSettings(_Section):
    """A disk tier."""

    path: Path = Field(description="directory of the swap file, on a fast drive")
    budget: NBytes = Field(description="bytes the swap file may take")
    verify: bool = Field(False, description="check a CRC-32C of everything read back")
    endurance: Annotated[str, AfterValidator(_check_endurance)] | None = Field(
        None, description='what the drive is rated to take, such as "600 TBW"'
    )


class MemorySettings(_Section):
    """How much memory the engine may take."""

    device: Annotated[str, AfterValidator(_check_device)] | None = Field(
        None, description='"cuda" or "cpu"; without: cuda if there is one'
    )
    device_budget: NBytes | None = Field(
        None, description='GPU memory for everything, such as "8GiB"; without: what is free'
    )
    host_budget: NBytes | None = Field(None, description="main memory for the engine; without: nearly all that is free")
    nvme: NvmeSettings | None = Field(None, description="disk for what memory cannot hold")
    service: str | None = Field(
        None, description='a memory service that grants it, such as "unix:/run/gemini.sock"; without: $GEMINI_SERVICE'
    )
    job: str | None = Field(None, description="what the service calls this run; without: the program and its process")
    activation_checkpointing: bool = Field(
        True, description="keep a block's input alone, and compute it again in backward"
    )


class TrainingSettings(_Section):
    """How it is trained."""

    steps: Count | None = Field(None, description="optimizer steps; without: as many as `epochs` makes")
    epochs: float = Field(1.0, gt=0, description="times the data is gone through")
    batch_size: Count = Field(1, description="rows of one forward and backward")
    gradient_accumulation: Count = Field(1, description="forwards and backwards of one optimizer step")
    learning_rate: float = Field(2e-5, gt=0, description="at its highest")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="how it changes"
    )
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="steps in which it rises to that")
    weight_decay: float = Field(0.0, ge=0, description="as of AdamW; not for norms and biases")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam's")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to that norm; 0: they are not")
    seed: int = Field(0, ge=0, lt=2**32, description="decides the order of the data, and random first weights")


class OutputSettings(_Section):
    """What is kept."""

    path: Path = Field(description="directory: checkpoints, the log and the trained model")
    save_steps: Count | None = Field(
        None, description="save a checkpoint every so many steps; without: only when a signal ends the run"
    )
    keep_last: Count = Field(2, description="checkpoints to keep")
    log_steps: Count = Field(1, description="log every so many steps")
    eval_steps: Count | None = Field(None, description="evaluate every so many steps; without: at the end")
    record: bool = Field(True, description="keep what `python -m gemini report` shows: every move of three steps")
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        [], description="loggers besides log.csv: tensorboard, wandb, trackio, mlflow, if they are installed"
    )


class Settings(_Section):
    """A whole training file."""

    model: ModelSettings = Field(description="what is trained")
    data: DataSettings = Field(description="what it is trained on")
    memory: MemorySettings = Field(MemorySettings(), description="how much memory it may take")
    training: TrainingSettings = Field(TrainingSettings(), description="how it is trained")
    output: OutputSettings = Field(description="what is kept")
