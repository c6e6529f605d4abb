"""Functions with parameters whose gradients may bypass autograd; see [Note: Gradients past autograd]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from gemini.autograd.gradient_sink import sink_of
from gemini.autograd.parameter_uses import embedding, separate_use

__all__ = ["CountingSink", "SharedUses"]


class CountingSink(Protocol):
    """A sink that counts the announced uses of its parameter."""

    num_announced: int
    has_other_uses: bool
    """Whether a use was not announced, so that autograd must sum the gradients of all."""


class SharedUses:
    """The parameters of one model that have several names or serve as embeddings, and the calls that use them."""

    def __init__(self) -> None:
        self.sinks: dict[int, CountingSink] = {}
        """Sinks by id of the parameter."""
        self.is_model_trained = False
        """Whether the running forward began with gradients enabled."""

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any, params: Sequence[torch.Tensor]) -> Any:
        """Call a function; embeddings, and linear layers with a shared parameter, as in gemini.autograd.parameter_uses.

        Without gradients no use is announced, because a reentrant checkpoint may be running, whose backward is a
        separate pass.

        Args:
            func: any torch function.
            args: positional arguments of the function.
            kwargs: keyword arguments of the function.
            params: the parameters among the arguments.

        Returns:
            The function's result.
        """
        if func is F.embedding:
            for param in params:
                sink: Any = sink_of(param)
                if sink is not None and hasattr(sink, "num_announced"):
                    self.sinks[id(param)] = sink
        used = [self.sinks[id(param)] for param in params if id(param) in self.sinks] if self.sinks else []
        if not used or not (torch.is_grad_enabled() or self.is_model_trained):
            return func(*args, **kwargs)
        num_announced = [sink.num_announced for sink in used]
        if func is F.embedding:
            func = embedding
        elif func is F.linear:
            args, kwargs = self._with_separate_weight(args, kwargs)
        result = func(*args, **kwargs)
        for sink, num_before in zip(used, num_announced, strict=True):
            if sink.num_announced == num_before:
                sink.has_other_uses = True
        return result

    def _with_separate_weight(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of a linear layer with a separate use in place of a shared weight."""
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if id(weight) not in self.sinks:
            return args, kwargs
        if len(args) > 1:
            return (args[0], separate_use(weight), *args[2:]), kwargs
        return args, {**kwargs, "weight": separate_use(weight)}
