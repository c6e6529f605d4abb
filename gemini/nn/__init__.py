"""What models can use by hand to need less memory; works with and without an engine."""

from gemini.nn.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy, next_token_labels

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy", "next_token_labels"]
