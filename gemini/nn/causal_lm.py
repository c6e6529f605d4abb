"""The sliced loss for Hugging Face's causal language models, enabled by one call on the model.

[Note: How a model gets its sliced loss]
A forward with labels runs the model's own code with two replacements: the output layer returns `DeferredLogits` in
place of logits, and `loss_function`, transformers' own hook for it, computes the loss from these. So everything else in
the model (a router's loss, soft capping, scaling) happens as before, and anything that needs the logits raises. A
forward without labels is the model's own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gemini.errors import ModelError
from gemini.nn.deferred_logits import DeferredLogits
from gemini.nn.linear_cross_entropy import Slicing, check_options, linear_cross_entropy, next_token_labels

__all__ = ["use_plain_loss", "use_sliced_loss"]

_LOSS_NAME = "ForCausalLMLoss"
LOSS_ARGUMENTS = frozenset({"logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"})
"""Arguments with which that loss computes; any other name is unknown here."""
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_REMEDY = "call linear_cross_entropy in your own forward"


def use_sliced_loss(
    model: torch.nn.Module,
    *,
    slicing: Slicing = "vocabulary",
    slice_size: int | None = None,
    keep_logits: bool = False,
) -> None:
    """Make a transformers causal language model compute its loss with `linear_cross_entropy` from now on.

    `model(input_ids=..., labels=...)` then returns the same loss as before and no logits; without labels, nothing
    changes. May be called before or after GeminiDDP or PEFT wrap the model, and again to change the slicing.

    Args:
        model: a causal language model of transformers, or a wrapper with one inside; its `forward` is replaced.
        slicing: dimension of the logits that is sliced, as in `linear_cross_entropy`.
        slice_size: rows, or tokens of the vocabulary, whose logits exist at once; None: chosen by their bytes.
        keep_logits: keep the logits once, from forward to backward; faster if they fit into memory.

    Raises:
        ConfigError: an option is invalid.
        ModelError: the model has no output layer that is a Linear, or has another loss. In a forward with labels: the
            model needs the logits for something other than this loss.
    """
    check_options("mean", 0.0, slicing, slice_size, keep_logits)
    inner = _causal_lm_in(model)
    use_plain_loss(inner)
    _output_layer_of(inner)
    loss_name = getattr(inner.loss_function, "__name__", type(inner.loss_function).__name__)
    if loss_name != _LOSS_NAME:
        raise ModelError(
            f"{type(inner).__name__}: its loss is {loss_name}, expected transformers' {_LOSS_NAME}; {_REMEDY}"
        )
    _check_loss_arguments(inner)
    inner.forward = _SlicedLossForward(inner, inner.forward, slicing, slice_size, keep_logits)


def use_plain_loss(model: torch.nn.Module) -> None:
    """Undo `use_sliced_loss`; does nothing to a model without it.

    Args:
        model: a model given to `use_sliced_loss`, or a wrapper of it.

    Raises:
        ModelError: it contains no causal language model of transformers.
    """
    inner = _causal_lm_in(model)
    forward = inner.__dict__.get("forward")
    if isinstance(forward, _SlicedLossForward):
        del inner.forward
        if inner.forward != forward.plain:  # other code had replaced it before
            inner.forward = forward.plain


def _causal_lm_in(model: torch.nn.Module) -> Any:
    """Return the outermost model with an output layer and transformers' place for a loss."""
    for module in model.modules():
        kind = type(module)  # wrappers pass on attributes that their instances lack
        has_parts = hasattr(kind, "get_output_embeddings") and hasattr(kind, "loss_function")
        if has_parts and module.get_output_embeddings() is not None:  # type: ignore[operator]
            return module
    raise ModelError(f"{type(model).__name__}: expected a causal language model of transformers; {_REMEDY}")


def _check_loss_arguments(model: Any) -> None:
    """Refuse a loss with unknown arguments, because they would be silently ignored."""
    params = inspect.signature(model.loss_function).parameters.values()
    unknown = [each.name for each in params if each.kind not in _ANY and each.name not in LOSS_ARGUMENTS]
    if unknown:
        raise ModelError(
            f"{type(model).__name__}: its loss takes {unknown[0]}, which is unknown here: this version of "
            f"transformers is too new; {_REMEDY}"
        )


def _output_layer_of(model: Any) -> Any:
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear) and getattr(head.forward, "__func__", None) is torch.nn.Linear.forward:
        return head
    raise ModelError(
        f"{type(model).__name__}: expected an output layer that is a plain torch.nn.Linear, got {type(head).__name__}; "
        f"{_REMEDY}"
    )


@dataclass(eq=False)
class _SlicedLossForward:
    """Replaces a model's `forward`; an object, so that a copy of the model gets its own."""

    model: Any
    plain: Callable[..., Any]
    """Model's own forward, bound."""
    slicing: Slicing
    slice_size: int | None
    keep_logits: bool

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Attribute that `inspect.signature` reads."""
        return self.plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None and args:
            labels = inspect.signature(self.plain).bind_partial(*args).arguments.get("labels")
        if labels is None:
            return self.plain(*args, **kwargs)
        with self._exchanged():
            return _without_logits(self.plain(*args, **kwargs))

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        """Replace the output layer's result by `DeferredLogits`, and the model's loss by one that takes them."""
        head, plain_loss = _output_layer_of(self.model), self.model.loss_function
        name = type(self.model).__name__
        head.forward = lambda hidden: DeferredLogits(name, hidden, head.weight, head.bias)
        self.model.loss_function = self._loss
        try:
            yield
        finally:
            del head.forward
            self.model.loss_function = plain_loss

    def _loss(
        self,
        logits: object,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Compute what transformers' ForCausalLMLoss computes from the same arguments."""
        name = type(self.model).__name__
        if not isinstance(logits, DeferredLogits):
            raise ModelError(f"{name}: its logits do not come from its output layer alone; {_REMEDY}")
        if len(logits.weight) != vocab_size:
            raise ModelError(
                f"{name}: the output layer has {len(logits.weight)} tokens, the configuration {vocab_size}; {_REMEDY}"
            )
        if shift_labels is None:
            assert labels is not None
            shift_labels = next_token_labels(labels, ignore_index=ignore_index)
        if logits.hidden.dtype is torch.float64:
            logits = logits.float()  # transformers computes its losses in float32
        loss = linear_cross_entropy(
            logits.hidden,
            logits.weight,
            shift_labels.to(logits.device).reshape(logits.hidden.shape[:-1]),
            logits.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            logits_fn=logits.logits_fn,
            slicing=self.slicing,
            slice_size=self.slice_size,
            keep_logits=self.keep_logits,
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


def _without_logits(output: Any) -> Any:
    """Return a model's output without the placeholder: None in its place, or removed from a tuple."""
    if isinstance(output, tuple):
        return tuple(value for value in output if not isinstance(value, DeferredLogits))
    deferred = [
        field.name for field in dataclasses.fields(output) if isinstance(getattr(output, field.name), DeferredLogits)
    ]
    return dataclasses.replace(output, **dict.fromkeys(deferred))
