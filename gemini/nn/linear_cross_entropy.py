"""The output layer and the cross entropy in one function, slice by slice, so that memory never holds all logits.

Knows no models and no engine: plain functions of tensors.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from gemini.autograd.gradient_sink import use_of
from gemini.errors import ConfigError
from gemini.nn.sliced_head import LogitsFn, SlicedHead, TargetLogProbs, default_slice_size

__all__ = [
    "LinearCrossEntropyLoss",
    "LogitsFn",
    "Reduction",
    "Slicing",
    "check_options",
    "linear_cross_entropy",
    "next_token_labels",
]

Reduction = Literal["none", "mean", "sum"]
Slicing = Literal["rows", "vocabulary"]

_IGNORED_ROW = -100


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    logits_fn: LogitsFn | None = None,
    slicing: Slicing = "vocabulary",
    slice_size: int | None = None,
    keep_logits: bool = False,
) -> torch.Tensor:
    """Compute `F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)` without holding all logits.

    Exact except for the order of sums: the loss differs from torch's by a few units in the last place of float32
    (float64 for float64 inputs). With slices of rows it does not differ if their matrix products have the same bits.
    Gradients flow to `hidden`, `weight` and `bias`, but not to second order. Half-precision gradients are summed over
    the slices in float32. Autocast is respected. Inside a model that a GeminiDDP manages, call it in the model's
    forward.

    Args:
        hidden: inputs of the output layer, float [..., hidden_size].
        weight: weight of the output layer, of the same dtype, [vocabulary, hidden_size].
        labels: int64 [...], in the shape of `hidden` without its last dimension; already shifted, see
            `next_token_labels`.
        bias: bias of the output layer, [vocabulary].
        ignore_index: label of positions that are left out of the loss and its mean.
        reduction: "mean" over the positions that count (NaN if there are none, as in torch), "sum", or "none".
        label_smoothing: probability spread evenly over the vocabulary, in [0, 1].
        logits_fn: differentiable elementwise function of the logits, such as soft capping; gradients flow through it,
            but not to tensors it closes over. Its result may have a narrower dtype than float32 (float64 for
            float64 inputs), but not a wider one.
        slicing: dimension of the logits that is sliced; see [Note: Two ways to slice] in sliced_head.py.
        slice_size: rows, or tokens of the vocabulary, whose logits exist at once; None: 16 MiB of float32 logits on the
            CPU, 256 MiB elsewhere, and at least 64.
        keep_logits: keep all logits once, in the dtype of `hidden`, from forward to backward. Backward then needs a
            quarter fewer matrix products; no bit changes.

    Returns:
        The loss, float32 (float64 for float64 inputs), [] or, for "none", in the shape of `labels`.

    Raises:
        ConfigError: shapes, dtypes or options do not match.
        IndexError: a label is neither `ignore_index` nor in the vocabulary; on a CUDA device, as for torch's own loss,
            an assertion on the device.
    """
    tensors = (hidden, weight, labels) if bias is None else (hidden, weight, labels, bias)
    if has_torch_function(tensors):  # a single function for observers such as an engine
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            *tensors,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            logits_fn=logits_fn,
            slicing=slicing,
            slice_size=slice_size,
            keep_logits=keep_logits,
        )
    _check(hidden, weight, labels, bias)
    check_options(reduction, label_smoothing, slicing, slice_size, keep_logits)
    weight_use = use_of(weight)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    row_labels = labels.reshape(-1)
    is_counted = row_labels != ignore_index
    _check_range(row_labels, is_counted, len(weight))
    if slice_size is None:
        slice_size = default_slice_size(hidden.device, len(weight if slicing == "rows" else rows))
    head = SlicedHead(
        by_rows=slicing == "rows",
        slice_size=slice_size,
        smoothing=label_smoothing,
        logits_fn=logits_fn,
        keeps_logits=keep_logits,
    )
    log_probs: torch.Tensor = TargetLogProbs.apply(
        rows, weight, bias, row_labels.where(is_counted, 0), head, weight_use
    )  # type: ignore[no-untyped-call]
    # torch's own reduction over a vocabulary of one token: counts, ignores and sums in torch's order.
    targets = torch.where(is_counted, 0, _IGNORED_ROW)
    loss = F.nll_loss(log_probs[:, None], targets, ignore_index=_IGNORED_ROW, reduction=reduction)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def next_token_labels(token_ids: torch.Tensor, *, ignore_index: int = -100) -> torch.Tensor:
    """Return the next token of each position, and `ignore_index` for the last one.

    Args:
        token_ids: int64 [..., positions].
        ignore_index: label of positions that are ignored.

    Returns:
        A new tensor, int64 [..., positions].
    """
    return F.pad(token_ids[..., 1:], (0, 1), value=ignore_index)


class LinearCrossEntropyLoss(torch.nn.Module):
    """`linear_cross_entropy` as a module without parameters; each call gets those of the output layer.

    Args:
        ignore_index: label of positions that are ignored.
        reduction: "mean", "sum" or "none".
        label_smoothing: probability spread evenly over the vocabulary.
        logits_fn: elementwise function of the logits.
        slicing: "rows" or "vocabulary".
        slice_size: rows, or tokens of the vocabulary, whose logits exist at once.
        keep_logits: keep the logits from forward to backward.

    Raises:
        ConfigError: an option is invalid.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        logits_fn: LogitsFn | None = None,
        slicing: Slicing = "vocabulary",
        slice_size: int | None = None,
        keep_logits: bool = False,
    ) -> None:
        super().__init__()
        check_options(reduction, label_smoothing, slicing, slice_size, keep_logits)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.logits_fn = logits_fn
        self.slicing: Slicing = slicing
        self.slice_size = slice_size
        self.keep_logits = keep_logits

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the loss; see `linear_cross_entropy`."""
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            logits_fn=self.logits_fn,
            slicing=self.slicing,
            slice_size=self.slice_size,
            keep_logits=self.keep_logits,
        )


# ---------------------------------------------------------------- checks


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ConfigError(
            "linear_cross_entropy: expected hidden [..., hidden_size] and weight [vocabulary, hidden_size], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype is not torch.int64:
        raise ConfigError(
            f"linear_cross_entropy: expected labels of shape {list(hidden.shape[:-1])} and int64, one for each "
            f"position, got {list(labels.shape)} and {labels.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(
            f"linear_cross_entropy: expected a bias of shape {list(weight.shape[:1])}, got {list(bias.shape)}"
        )


def check_options(
    reduction: str, label_smoothing: float, slicing: str, slice_size: int | None, keep_logits: bool
) -> None:
    """Raise ConfigError if an option of `linear_cross_entropy` has no meaning."""
    if reduction not in ("none", "mean", "sum"):
        raise ConfigError(f'linear_cross_entropy: reduction: expected "none", "mean" or "sum", got {reduction!r}')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ConfigError(
            f"linear_cross_entropy: label_smoothing: expected a number from 0 to 1, got {label_smoothing}"
        )
    if slicing not in ("rows", "vocabulary"):
        raise ConfigError(f'linear_cross_entropy: slicing: expected "rows" or "vocabulary", got {slicing!r}')
    if slice_size is not None and slice_size < 1:
        raise ConfigError(f"linear_cross_entropy: slice_size: expected at least 1, got {slice_size}")
    if not isinstance(keep_logits, bool):
        raise ConfigError(f"linear_cross_entropy: keep_logits: expected True or False, got {keep_logits!r}")


def _check_range(row_labels: torch.Tensor, is_counted: torch.Tensor, num_tokens: int) -> None:
    is_wrong = is_counted & ((row_labels < 0) | (row_labels >= num_tokens))
    if row_labels.device.type == "cpu":
        if bool(is_wrong.any()):
            row = int(is_wrong.nonzero()[0])
            raise IndexError(f"label {int(row_labels[row])} of row {row} is outside the vocabulary of {num_tokens}")
    else:
        torch._assert_async(~is_wrong.any(), f"a label is outside the vocabulary of {num_tokens}")
