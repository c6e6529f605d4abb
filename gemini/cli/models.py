"""Models by name: known shapes, transformers' config.json, or a user's function. Nothing is downloaded."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gemini.errors import ConfigError, GeminiError
from gemini.nn import use_sliced_loss
from gemini.nn.sliced_head import default_slice_size
from gemini.planning.rehearsal import LossFn

__all__ = ["SHAPES", "causal_lm_loss", "describe_model_names", "load_model", "naming_model", "slice_loss"]


def _gpt2(num_layers: int, hidden_size: int, num_heads: int) -> dict[str, Any]:
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {"model_type": "gpt2", "n_layer": num_layers, "n_embd": hidden_size, "n_head": num_heads, **no_dropout}


def _llama(
    num_layers: int, hidden_size: int, inner_size: int, num_heads: int, *, num_kv_heads: int, vocab_size: int = 32000
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": inner_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": vocab_size,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "tinyllama-1.1b": _llama(22, 2048, 5632, 32, num_kv_heads=4),
    "llama-7b": _llama(32, 4096, 11008, 32, num_kv_heads=32),
    "llama-13b": _llama(40, 5120, 13824, 40, num_kv_heads=40),
    "llama-70b": _llama(80, 8192, 28672, 64, num_kv_heads=8),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, num_kv_heads=8, vocab_size=128256),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64, num_kv_heads=8, vocab_size=128256),
}
"""Arguments of the transformers configuration of that model type."""

_FUNCTION_FORM = "module:function"


def describe_model_names() -> str:
    """Return the accepted model names, for a help text."""
    return (
        f"one of {', '.join(SHAPES)}; a config.json of transformers or a directory with one; or {_FUNCTION_FORM}, "
        "a function without arguments that returns a model like transformers' causal language models"
    )


def load_model(name: str, *, sequence_length: int = 1, has_checkpoints: bool = False) -> torch.nn.Module:
    """Build a model on the meta device, in training mode.

    Args:
        name: a name that `describe_model_names` describes.
        sequence_length: number of tokens of each sequence.
        has_checkpoints: whether blocks recompute their activations in backward.

    Returns:
        The model.

    Raises:
        ConfigError: the model does not exist, has too few positions, or has no activation checkpointing.
    """
    path = Path(name)
    if name not in SHAPES and ":" in name:
        model = _call_function(name)
    elif name in SHAPES or path.exists():
        model = _from_transformers(name, sequence_length)
    else:
        raise ConfigError(f"model {name!r}: expected {describe_model_names()}")
    if has_checkpoints:
        # The second name is used before transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ConfigError(
                f"model {name!r}: {type(model).__name__} has no activation checkpointing; "
                "leave out --checkpoint-activations"
            )
        enable({"use_reentrant": False})
    return model.train()


def _from_transformers(name: str, sequence_length: int) -> Any:
    import transformers

    from gemini.recipe.positions import check_positions

    try:
        if name in SHAPES:
            config = transformers.AutoConfig.for_model(**SHAPES[name])
        else:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # errors of many types, because a configuration may hold anything
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"model {name!r}: expected a causal language model of transformers: {first}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model {name!r}: it is quantized, and quantized models cannot be trained: give the config of the original"
        )
    if name not in SHAPES:
        check_positions(config, sequence_length, name="--seq")
    model.config.use_cache = False
    model.loss_type = model.loss_type or "ForCausalLM"  # None, with a warning, if the class's name does not tell
    return model


def _call_function(name: str) -> torch.nn.Module:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # errors of any type from the module itself
        raise ConfigError(
            f"model {name!r}: {_told(error)}; expected {_FUNCTION_FORM} as Python imports them"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    with naming_model(name), torch.device("meta"):
        model = function()
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model {name!r}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


@contextmanager
def naming_model(name: str) -> Iterator[None]:
    """Turn errors of a user's code in the context into a ConfigError that says what failed, and where.

    Args:
        name: name of the model.

    Yields:
        Nothing.

    Raises:
        ConfigError: the code raised an error that is not this package's.
    """
    try:
        yield
    except GeminiError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(f"model {name!r}: {frame.filename}:{frame.lineno}: {_told(error)}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def slice_loss(model: torch.nn.Module, num_tokens: int, *, has_device: bool) -> None:
    """Make a model compute its loss in slices, sized for the planned device.

    Args:
        model: a causal language model of transformers.
        num_tokens: number of tokens in a batch.
        has_device: whether the model runs on a device.
    """
    device = torch.device("cuda" if has_device else "cpu")
    use_sliced_loss(model, slice_size=default_slice_size(device, num_tokens))


def causal_lm_loss(num_sequences: int, sequence_length: int) -> LossFn:
    """Return a function that gives a batch to a causal language model and returns its loss.

    Args:
        num_sequences: number of sequences in the batch.
        sequence_length: number of tokens in each.

    Returns:
        The function.
    """

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        token_ids = torch.zeros(num_sequences, sequence_length, dtype=torch.int64)
        loss = getattr(model(input_ids=token_ids, labels=token_ids), "loss", None)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ConfigError(
                f"{type(model).__name__}: expected an output with a loss of one element, as transformers' models "
                "return if they get labels"
            )
        return loss

    return loss_of
