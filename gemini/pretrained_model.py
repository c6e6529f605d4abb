"""`load_pretrained`: an engine from a checkpoint directory in one call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gemini.config import GeminiConfig
from gemini.ddp import GeminiDDP
from gemini.errors import CheckpointError, ConfigError
from gemini.pretrained.conversions import import_transformers
from gemini.pretrained.files import CONFIG, check_directory

__all__ = ["load_pretrained"]

GENERATION_CONFIG = "generation_config.json"
MESSAGE_LENGTH = 300
"""Characters of what transformers says that are passed on."""


def load_pretrained(
    path: str | os.PathLike[str],
    config: GeminiConfig | None = None,
    *,
    model_class: type | None = None,
    model_config: Any = None,
) -> GeminiDDP:
    """Build a transformers model and stream its checkpoint directly to the tiers that the plan has chosen.

    Loading takes no more memory than training: in addition to the homes, one tile at a time is read.

    Args:
        path: the checkpoint's directory, with config.json and one safetensors file, or several with their index.
        config: the settings; None: defaults.
        model_class: a class of transformers, automatic (`AutoModelForCausalLM`) or not. None: the class that the
            checkpoint was saved from.
        model_config: transformers' configuration of the model; None: the one in `path`.

    Returns:
        The engine. The model is in evaluation mode, as from `from_pretrained`: call `train()` before training.
        Missing and unexpected weights are listed in `loading_report` and logged.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, a file is missing, or transformers cannot build the
            model; code that comes with a checkpoint is not run.
        CheckpointMismatchError: it belongs to another model.
        ConfigError: the configuration contradicts itself or the machine; transformers is missing or too old; or the
            class must be given.
        OutOfTierMemoryError: the budgets cannot hold the model.
        OffloadIOError: a file cannot be read, or the swap file cannot be made, claimed or filled.
    """
    directory = Path(path)
    check_directory(directory)
    transformers, _ = import_transformers("gemini.load_pretrained")
    config = config or GeminiConfig()
    if model_config is None:
        if not (directory / CONFIG).is_file():
            raise CheckpointError(f"{directory} has no {CONFIG} to build the model from: give model_config=")
        config_class: Any = getattr(model_class, "config_class", None) or transformers.AutoConfig
        trust = {"trust_remote_code": False} if config_class is transformers.AutoConfig else {}
        with _by_transformers("read", directory / CONFIG):
            model_config = config_class.from_pretrained(directory, **trust)
    chosen: Any = model_class or _class_of(transformers, model_config)
    with _by_transformers("build a model from", directory), torch.device("meta"):
        if hasattr(chosen, "from_config"):
            model = chosen.from_config(model_config, dtype=config.dtype, trust_remote_code=False)
        else:
            model = chosen._from_config(model_config, dtype=config.dtype)
    if model.can_generate() and (directory / GENERATION_CONFIG).is_file():
        with _by_transformers("read", directory / GENERATION_CONFIG):
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    engine = GeminiDDP(model, config, weights=directory)
    engine.eval()
    return engine


def _class_of(transformers: Any, model_config: Any) -> Any:
    """Return the class that a configuration says it was saved from."""
    names = getattr(model_config, "architectures", None) or []
    found = getattr(transformers, str(names[0]), None) if names else None
    if not hasattr(found, "_from_config"):
        raise ConfigError(
            f"gemini.load_pretrained: transformers has no model class {names[0] if names else 'named in config.json'}: "
            "give model_class="
        )
    return found


@contextmanager
def _by_transformers(operation: str, what: Path) -> Iterator[None]:
    """Turn any error of transformers in the context into a CheckpointError that names the file or directory."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot {operation} {what} ({type(error).__name__}: {_shortened(error)}); correct it, "
            "or build the model yourself and load with GeminiDDP(model, config, weights=DIRECTORY)"
        ) from error


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]} ..."
