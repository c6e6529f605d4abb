"""Checks that a model has enough positions for a sequence length."""

from __future__ import annotations

from typing import Any

from gemini.errors import ConfigError

__all__ = ["check_positions"]


def check_positions(config: Any, sequence_length: int, *, name: str) -> None:
    """Refuse sequences that are longer than a model's positions.

    Learned positions would fail with an index out of range, others would take values that the model has never seen.

    Args:
        config: transformers' configuration.
        sequence_length: number of tokens.
        name: name of the setting, for messages.

    Raises:
        ConfigError: there are too few positions.
    """
    num_positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if num_positions is not None and sequence_length > num_positions:
        raise ConfigError(
            f"{name}: expected at most {num_positions} tokens, the positions of the model, got {sequence_length}: "
            "shorten the sequences, or set max_position_embeddings in its config.json, if it can be extended"
        )
