"""What the benchmarks that train have in common: activation checkpointing, and a step of each system."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["Step", "deepspeed_step", "enable_checkpointing", "training_step"]

Step = Callable[[torch.Tensor], torch.Tensor]
"""Trains on token ids, int64 [batch, seq], and returns the loss, without its graph."""


def enable_checkpointing(model: Any) -> None:
    """Let a transformers model recompute each block's activations in backward instead of keeping them."""
    # The second name is the one before transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def training_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Step:
    """Return a step of a transformers model, or of an engine around one.

    Args:
        model: takes token ids as inputs and labels.
        optimizer: updates its parameters.
        max_norm: the gradients' global norm is clipped to this; None: the optimizer does it, or nobody.
        precision: makes the context in which forward runs.
    """

    def step(batch: torch.Tensor) -> torch.Tensor:
        with precision():
            loss: torch.Tensor = model(input_ids=batch, labels=batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def deepspeed_step(engine: Any) -> Step:
    """Return a step of a DeepSpeed engine, which clips and clears gradients by itself."""

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step
