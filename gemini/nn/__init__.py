"""Losses that models can call to need less memory; works with and without an engine."""

from gemini.nn.causal_lm import use_plain_loss, use_sliced_loss
from gemini.nn.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy, next_token_labels

__all__ = [
    "LinearCrossEntropyLoss",
    "linear_cross_entropy",
    "next_token_labels",
    "use_plain_loss",
    "use_sliced_loss",
]
