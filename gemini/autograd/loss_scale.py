"""Dynamic loss scaling for float16.

Gradients are scaled where they enter the model: an identity on the model's outputs multiplies the incoming gradient.
Because backward is linear, this equals scaling the loss. The loss value and `loss.backward()` stay unchanged.
"""

from __future__ import annotations

from typing import Any

import torch

from gemini.model.outputs import map_tensors

__all__ = ["LossScaler", "scale_gradients_of"]

MIN_SCALE = 1.0
MAX_SCALE = 2.0**32


class LossScaler:
    """A power of two that halves after an overflow and doubles after a run of good steps.

    Args:
        initial_scale: first scale, a power of two.
        growth_interval: number of good steps in a row before the scale doubles.
    """

    def __init__(self, initial_scale: float, *, growth_interval: int = 1000) -> None:
        self.scale = float(initial_scale)
        self.growth_interval = growth_interval
        self.num_good_steps = 0

    def update(self, *, found_overflow: bool) -> None:
        """Adjust the scale after a step."""
        if found_overflow:
            self.scale = max(self.scale / 2, MIN_SCALE)
            self.num_good_steps = 0
            return
        self.num_good_steps += 1
        if self.num_good_steps == self.growth_interval:
            self.scale = min(self.scale * 2, MAX_SCALE)
            self.num_good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """Return the state that a resumed run needs."""
        return {"scale": self.scale, "num_good_steps": self.num_good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a state from `state_dict`."""
        self.scale = float(state["scale"])
        self.num_good_steps = int(state["num_good_steps"])


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradients_of(values: Any, factor: float) -> Any:
    """Return the same values, whose tensors' gradients are multiplied by `factor` on the way back."""

    def scale(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        scaled: torch.Tensor = _ScaleGradient.apply(tensor, factor)  # type: ignore[no-untyped-call]
        return scaled

    return map_tensors(scale, values)
