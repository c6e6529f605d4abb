"""Weights in Hugging Face's layout, streamed between a directory and the tiers in which they are stored."""

from gemini.pretrained.saving import DEFAULT_SHARD_SIZE, save_pretrained, showing_weights
from gemini.pretrained.source import LoadingReport, open_pretrained

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "LoadingReport",
    "open_pretrained",
    "save_pretrained",
    "showing_weights",
]
