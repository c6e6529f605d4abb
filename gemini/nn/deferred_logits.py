"""Substitute for a language model's logits between its output layer and its loss: how to compute them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from gemini.errors import ModelError
from gemini.nn.sliced_head import LogitsFn

__all__ = ["DeferredLogits"]


class DeferredLogits:
    """The output layer's arguments, and the operations of the model on its result.

    Elementwise operations (scaling, soft capping, casts) are recorded and applied to each slice. Any other use raises
    ModelError, because it needs the logits. Not a dataclass, because the engine would take its tensors for outputs.

    Args:
        model_name: name of the model, for error messages.
        hidden: inputs of the output layer, float [..., hidden_size].
        weight: weight of the output layer, [vocabulary, hidden_size].
        bias: bias of the output layer, [vocabulary].
        steps: elementwise functions, in the order in which the model called them.
    """

    def __init__(
        self,
        model_name: str,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        steps: tuple[LogitsFn, ...] = (),
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self._model_name = model_name
        self._steps = steps

    @property
    def logits_fn(self) -> LogitsFn | None:
        """All steps as one function; None if there are none."""
        if not self._steps:
            return None

        def run(logits: torch.Tensor) -> torch.Tensor:
            for step in self._steps:
                logits = step(logits)
            return logits

        return run

    @property
    def device(self) -> torch.device:
        """Device that the logits would have."""
        return self.hidden.device

    @property
    def shape(self) -> torch.Size:
        """Shape that the logits would have."""
        return torch.Size((*self.hidden.shape[:-1], len(self.weight)))

    def contiguous(self) -> DeferredLogits:
        """Return itself."""
        return self

    def float(self) -> DeferredLogits:
        """Defer a cast to float32."""
        return self._after(torch.Tensor.float)

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """Defer a cast or move, with the arguments of `torch.Tensor.to`."""
        return self._after(lambda logits: logits.to(*args, **kwargs))

    def tanh(self) -> DeferredLogits:
        """Defer a hyperbolic tangent."""
        return self._after(torch.tanh)

    def __mul__(self, factor: object) -> DeferredLogits:
        return self._after_scaling(operator.mul, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> DeferredLogits:
        return self._after_scaling(operator.truediv, divisor)

    def _after_scaling(self, operate: Callable[[torch.Tensor, Any], torch.Tensor], operand: object) -> DeferredLogits:
        is_number = isinstance(operand, (int, float))
        if not is_number and not (isinstance(operand, torch.Tensor) and operand.dim() == 0):
            raise self._refusal("scales its logits by something other than a number")
        if isinstance(operand, torch.Tensor) and operand.requires_grad:
            raise self._refusal("scales its logits by a trainable tensor")
        return self._after(lambda logits: operate(logits, operand))

    def _after(self, step: LogitsFn) -> DeferredLogits:
        return DeferredLogits(self._model_name, self.hidden, self.weight, self.bias, (*self._steps, step))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        logits = next(value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls))
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return logits.tanh()
        raise logits._refusal(f"calls {getattr(func, '__name__', func)} on its logits")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python and torch probe for these names
            raise AttributeError(name)
        raise self._refusal(f"reads logits.{name}")

    def __getitem__(self, place: object) -> Any:
        raise self._refusal("reads logits[...]")

    def _refuse_operator(self, other: object = None) -> Any:
        raise self._refusal("does arithmetic on its logits")

    __add__ = __radd__ = __sub__ = __rsub__ = __rtruediv__ = __neg__ = __pow__ = _refuse_operator

    def _refusal(self, what: str) -> ModelError:
        return ModelError(
            f"{self._model_name} {what} before its loss, so the loss cannot be computed in slices: leave out "
            "use_sliced_loss, or call linear_cross_entropy in your own forward"
        )
