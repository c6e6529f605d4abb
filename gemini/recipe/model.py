"""The trained model: its description without memory, its tokenizer, and adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from gemini.errors import ConfigError, ModelError
from gemini.nn import use_sliced_loss
from gemini.recipe.positions import check_positions
from gemini.recipe.settings import LoraSettings, ModelSettings

__all__ = ["build_model", "find_model", "read_config", "read_tokenizer", "save_activation_memory"]


def find_model(settings: ModelSettings) -> Path:
    """Return the path of the model's directory or config.json; a model of the hub is downloaded.

    Args:
        settings: settings of the model.

    Returns:
        An existing path.

    Raises:
        ConfigError: the model is neither a path nor in the hub.
    """
    source = settings.path or settings.config
    assert source is not None
    name = "model.path" if settings.path is not None else "model.config"
    local = Path(source).expanduser()
    if local.exists():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"]))
    except Exception as error:  # errors of many types, from the network or the name
        raise ConfigError(
            f"{name}: there is no directory {source}, and the hub has no such model here: {_told(error)}"
        ) from error


def read_tokenizer(settings: ModelSettings, source: Path) -> Any:
    """Read a tokenizer.

    Args:
        settings: settings of the model, which may name the tokenizer's directory.
        source: the model's directory, which is the default.

    Returns:
        transformers' tokenizer.

    Raises:
        ConfigError: there is no tokenizer, or it has no end-of-sequence token.
    """
    directory = source if settings.tokenizer is None else Path(settings.tokenizer).expanduser()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # errors of many types, because the files may hold anything
        raise ConfigError(
            f"model.tokenizer: {directory}: expected a directory with a tokenizer: {_told(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.tokenizer: {directory}: expected a tokenizer with an end-of-sequence token")
    return tokenizer


def read_config(source: Path) -> Any:
    """Read a model's configuration.

    Args:
        source: the model's directory or config.json.

    Returns:
        transformers' configuration.

    Raises:
        ConfigError: there is no configuration, or it is invalid.
    """
    try:
        return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # errors of many types, because the file may hold anything
        raise ConfigError(f"model: {source}: expected a model's configuration: {_told(error)}") from error


def build_model(settings: ModelSettings, config: Any, *, num_tokens: int, sequence_length: int) -> Any:
    """Describe the model without giving it memory.

    Args:
        settings: settings of the model, which may ask for adapters.
        config: a configuration from `read_config`.
        num_tokens: number of tokens that the tokenizer knows.
        sequence_length: length of the longest row.

    Returns:
        transformers' model on the meta device, or peft's model around it, in training mode.

    Raises:
        ConfigError: it is not a causal language model, or does not fit the tokenizer, the rows or the adapters.
    """
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # errors of many types, because a configuration may hold anything
        raise ConfigError(f"model: expected a causal language model's configuration: {_told(error)}") from error
    num_embeddings = model.get_input_embeddings().num_embeddings
    if num_tokens > num_embeddings:
        raise ConfigError(
            f"model.tokenizer: it has {num_tokens} tokens, the model has {num_embeddings} embeddings: use the "
            "model's own tokenizer"
        )
    check_positions(config, sequence_length, name="data.sequence_length")
    model.config.use_cache = False
    model.loss_type = model.loss_type or "ForCausalLM"  # None, with a warning, if the class's name does not tell
    return (model if settings.lora is None else _add_adapters(model, settings.lora)).train()


def save_activation_memory(model: Any, *, has_checkpoints: bool) -> None:
    """Make a model recompute activations in backward instead of keeping them.

    Args:
        model: a model from `build_model`.
        has_checkpoints: whether blocks recompute; the loss recomputes wherever it can.
    """
    if has_checkpoints:
        # The second name is used before transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with suppress(ModelError):  # another kind of output layer, such as an adapter: the model's own loss is used
        use_sliced_loss(model.get_base_model() if hasattr(model, "peft_config") else model)


def _add_adapters(model: Any, settings: LoraSettings) -> Any:
    import peft

    name = "model.lora.target_modules"
    if isinstance(settings.target_modules, list):
        _check_names(model, settings.target_modules, name=name)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise ConfigError(f"{name}: {_told(error)}") from error
    adapted.enable_input_require_grads()  # activation checkpointing needs their gradients
    return adapted


def _check_names(model: Any, names: Sequence[str], *, name: str) -> None:
    """Refuse names that match no module; peft ignores them as long as other names match."""
    modules = [path for path, _ in model.named_modules()]
    for each in names:
        if not any(path == each or path.endswith(f".{each}") for path in modules):
            known = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if _is_linear(module)})
            raise ConfigError(f"{name}: the model has no module {each}; its linear layers are {', '.join(known)}")


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))


def _told(error: Exception) -> str:
    """Return an error's text as one line; transformers' errors fill pages, or have the cause in their second line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
