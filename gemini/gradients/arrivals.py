"""What the gradient store tells, and to whom: the seam between gradients that arrive and updates that wait for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from gemini.errors import ModelError
from gemini.kernels.pool import GradTicket

__all__ = ["ArrivedGradients", "GradientListener", "second_gradient_error"]


@dataclass(frozen=True, slots=True)
class ArrivedGradients:
    """All gradients of a chunk, in host memory or on their way from there to disk."""

    tickets: tuple[GradTicket, ...]
    """What must be complete before they may be read."""
    slot: torch.Tensor | None
    """Where to read them as long as the slot is not needed by others; None: at home."""


class GradientListener(Protocol):
    """Who wants to know when gradients come and go."""

    def gradients_complete(self, chunk_id: int, arrived: ArrivedGradients) -> bool:
        """Handle that a backward pass has delivered all gradients of a chunk.

        Args:
            chunk_id: the chunk.
            arrived: where its gradients are.

        Returns:
            Whether they will be read from `arrived.slot`; then the slot is not reused before `leave_gradient_slot`.
        """

    def gradients_change(self, chunk_id: int) -> None:
        """Stop reading a chunk's gradients, which are about to change; what was made of them must not count."""

    def leave_gradient_slot(self, chunk_id: int) -> None:
        """Stop reading a chunk's gradients from a slot; they are at home too."""


def second_gradient_error(name: str, dtype: torch.dtype) -> ModelError:
    """Return the error for a parameter's gradient of a second backward pass where they wait in half precision."""
    return ModelError(
        f"a second gradient for {name} arrived before optimizer.step(): several backward passes per step need float32 "
        f"gradients, but they are kept as {dtype}; "
        "set GeminiConfig(gradient_accumulation=True), or call optimizer.zero_grad() to drop the first"
    )
