"""Models by name: shapes known here, transformers' config.json, or a function of the user's. Nothing is downloaded."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from gemini.errors import ConfigError
from gemini.nn import use_sliced_loss
from gemini.nn.sliced_head import default_slice_size
from gemini.rehearsal import LossFn

__all__ = ["SHAPES", "causal_lm_loss", "describe_model_names", "load_model", "slice_loss"]


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
    """Return what a model may be called, for a help text."""
    return (
        f"one of {', '.join(SHAPES)}; a config.json of transformers or a directory with one; or {_FUNCTION_FORM}, "
        "which is called without arguments and returns a model like transformers' causal language models"
    )


def load_model(name: str, *, has_checkpoints: bool = False) -> torch.nn.Module:
    """Build a model on the meta device, in training mode.

    Args:
        name: as `describe_model_names` says.
        has_checkpoints: whether blocks recompute their activations in backward.

    Returns:
        The model.

    Raises:
        ConfigError: there is no such model, or it has no activation checkpointing.
    """
    path = Path(name)
    if name not in SHAPES and ":" in name:
        model = _call_function(name)
    elif name in SHAPES or path.exists():
        model = _from_transformers(name)
    else:
        raise ConfigError(f"model {name!r}: expected {describe_model_names()}")
    if has_checkpoints:
        # The second name is the one before transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ConfigError(f"model {name!r}: {type(model).__name__} cannot checkpoint activations; leave it off")
        enable({"use_reentrant": False})
    return model.train()


def _from_transformers(name: str) -> Any:
    import transformers

    try:
        if name in SHAPES:
            config = transformers.AutoConfig.for_model(**SHAPES[name])
        else:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {name!r}: not a causal language model of transformers: {error}") from error
    model.config.use_cache = False
    model.loss_type = model.loss_type or "ForCausalLM"  # None where the class's name does not tell; it would warn
    return model


def _call_function(name: str) -> torch.nn.Module:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model {name!r}: {error}; expected {_FUNCTION_FORM} as Python imports them") from error
    finally:
        sys.path.remove(os.getcwd())
    with torch.device("meta"):
        model = function()
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model {name!r}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def slice_loss(model: torch.nn.Module, num_tokens: int, *, has_device: bool) -> None:
    """Let a model compute its loss in slices as long as they will be on the device that is planned for.

    Args:
        model: a causal language model of transformers.
        num_tokens: of a batch.
        has_device: whether it runs on a device.
    """
    device = torch.device("cuda" if has_device else "cpu")
    use_sliced_loss(model, slice_size=default_slice_size(device, num_tokens))


def causal_lm_loss(num_sequences: int, sequence_length: int) -> LossFn:
    """Return what gives a causal language model a batch and takes its loss.

    Args:
        num_sequences: of the batch.
        sequence_length: tokens of each.

    Returns:
        The function.
    """

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        token_ids = torch.zeros(num_sequences, sequence_length, dtype=torch.int64)
        loss: torch.Tensor = model(input_ids=token_ids, labels=token_ids).loss
        return loss

    return loss_of
