"""Log-probabilities under an output layer whose logits exist one slice at a time, and their gradients.

[Note: Two ways to slice]
*Rows*: all logits of `slice_size` positions at a time. Loss and gradients go through the same operations as torch's,
but each slice adds to the whole gradient of the weight. *Vocabulary*: the logits of all positions for `slice_size`
tokens at a time; each position's logsumexp is combined from the slices', and each slice of the weight's gradient is
computed once. Either way backward computes the logits again, which is one matrix product more than keeping them (which
`keeps_logits` does, if there is memory for it). docs/decisions/0007 says why the gradients are not computed in forward,
and which way is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gemini.autograd.gradient_sink import GradientPlace, GradientUse
from gemini.errors import ConfigError

__all__ = ["LogitsFn", "SlicedHead", "TargetLogProbs", "default_slice_size"]

LogitsFn = Callable[[torch.Tensor], torch.Tensor]

CPU_SLICE_NBYTES = 16 * 2**20
DEVICE_SLICE_NBYTES = 256 * 2**20
MIN_SLICE_LENGTH = 64
"""Minimum length of a slice; matrix products with a shorter side are slow."""


def default_slice_size(device: torch.device, other_numel: int) -> int:
    """Choose the length of slices so that float32 logits take `CPU_SLICE_NBYTES` or `DEVICE_SLICE_NBYTES`.

    Args:
        device: device of the logits.
        other_numel: extent of the dimension that is not sliced.

    Returns:
        Number of rows or tokens, at least `MIN_SLICE_LENGTH`.
    """
    nbytes = CPU_SLICE_NBYTES if device.type == "cpu" else DEVICE_SLICE_NBYTES
    return max(MIN_SLICE_LENGTH, nbytes // (4 * max(1, other_numel)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedHead:
    """The way in which logits are made and sliced."""

    by_rows: bool
    """Whether a slice is some rows with all tokens, rather than all rows with some tokens."""
    slice_size: int
    """Number of rows or tokens in a slice."""
    smoothing: float
    """Probability that the target spreads evenly over the vocabulary."""
    logits_fn: LogitsFn | None
    """Elementwise function between the output layer and the loss."""
    keeps_logits: bool = False
    """Whether forward leaves the output layer's results, all slices of them, to backward."""

    def logits(self, linear: torch.Tensor) -> torch.Tensor:
        """Return the logits for the loss, float32 or float64, from the output layer's; may be an alias of these."""
        if self.logits_fn is None:
            return linear.to(_sum_dtype(linear.dtype))
        logits = self.logits_fn(linear)
        expected = _sum_dtype(linear.dtype)
        if not logits.is_floating_point() or _sum_dtype(logits.dtype) != expected:
            raise ConfigError(
                f"linear_cross_entropy: expected logits_fn to return logits of {expected} or a smaller dtype, "
                f"because its input was {linear.dtype}, got {logits.dtype}; convert `hidden` and `weight` to "
                "compute in another dtype"
            )
        return logits.to(expected)

    def logits_backward(self, grad_of: Callable[[torch.Tensor], torch.Tensor], linear: torch.Tensor) -> torch.Tensor:
        """Propagate the gradient of the logits back through `logits_fn`.

        Args:
            grad_of: gradient of the logits as the loss sees them, from these; may overwrite them.
            linear: the output layer's results, [rows, tokens]; overwritten unless they are kept.

        Returns:
            Gradient of the output layer's results, of their dtype, [rows, tokens].
        """
        if self.logits_fn is None:
            return grad_of(linear.to(_sum_dtype(linear.dtype), copy=self.keeps_logits)).to(linear.dtype)
        linear = linear.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.logits_fn(linear)
        grad = grad_of(logits.detach().to(_sum_dtype(logits.dtype), copy=True))
        return torch.autograd.grad(logits, linear, grad.to(logits.dtype))[0]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _slices(total: int, slice_size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + slice_size, total)) for begin in range(0, total, slice_size))


class TargetLogProbs(torch.autograd.Function):
    """Log-probability of each row's target: the label or, smoothed, the label and the mean of all tokens.

    Source of the smoothed target: Szegedy et al. 2016, section 7.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        head: SlicedHead,
        weight_use: GradientUse | None,
    ) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        if head.by_rows:
            log_probs, normalisers = _log_probs_by_rows(head, rows, weight, bias, labels, kept), None
        else:
            log_probs, normalisers = _log_probs_by_vocabulary(head, rows, weight, bias, labels, kept)
        ctx.save_for_backward(rows, weight, bias, labels, normalisers, *kept)
        ctx.head, ctx.weight_use = head, weight_use
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        rows, weight, bias, labels, normalisers, *kept = ctx.saved_tensors
        sink = ctx.weight_use.sink if ctx.weight_use is not None and ctx.weight_use.is_open() else None
        # Slices of rows each add to the whole gradient, so it must be one tensor in float32.
        writing = None if sink is None or ctx.head.by_rows else sink.write()
        with torch.autocast(rows.device.type, enabled=False), writing or nullcontext() as place:
            grads = _Gradients(ctx.needs_input_grad, ctx.head, rows, weight, place)
            if ctx.head.by_rows:
                _backward_by_rows(ctx.head, rows, weight, bias, labels, grad, grads, kept)
            else:
                _backward_by_vocabulary(ctx.head, rows, weight, bias, labels, normalisers, grad, grads, kept)
        of_rows, of_weight, of_bias = grads.result()
        if sink is not None and of_weight is not None:
            sink.put(of_weight)
            of_weight = None
        return of_rows, of_weight, of_bias, None, None, None


def _log_probs_by_rows(
    head: SlicedHead,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    kept: list[torch.Tensor],
) -> torch.Tensor:
    """Return log-probabilities of the targets, [rows]; fills `kept` if the head keeps logits."""
    found = rows.new_empty(len(rows), dtype=_sum_dtype(rows.dtype))
    for part in _slices(len(rows), head.slice_size):
        linear = F.linear(rows[part], weight, bias)
        if head.keeps_logits:
            kept.append(linear)
        log_probs = head.logits(linear).log_softmax(dim=-1)
        found[part] = log_probs.gather(1, labels[part, None])[:, 0]
        if head.smoothing:
            found[part] = _smoothed(found[part], log_probs.mean(dim=-1), head.smoothing)
    return found


def _log_probs_by_vocabulary(
    head: SlicedHead,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    kept: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of the targets, and every row's logsumexp, both [rows]; fills `kept` as above."""
    normalisers = rows.new_full((len(rows),), -torch.inf, dtype=_sum_dtype(rows.dtype))
    at_label, total = torch.zeros_like(normalisers), torch.zeros_like(normalisers)
    for part in _slices(len(weight), head.slice_size):
        linear = F.linear(rows, weight[part], _part_of(bias, part))
        if head.keeps_logits:
            kept.append(linear)
        logits = head.logits(linear)
        normalisers = torch.logaddexp(normalisers, logits.logsumexp(dim=-1))
        place, is_here = _places(labels, part)
        at_label = torch.where(is_here, logits.gather(1, place[:, None])[:, 0], at_label)
        if head.smoothing:
            total += logits.sum(dim=-1)
    if head.smoothing:
        at_label = _smoothed(at_label, total / len(weight), head.smoothing)
    return at_label - normalisers, normalisers


def _smoothed(at_label: torch.Tensor, mean: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Compute the weighted mean as torch does; torch.lerp takes a difference, which is NaN where both are infinite."""
    return (1 - smoothing) * at_label + smoothing * mean


def _part_of(bias: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if bias is None else bias[part]


def _places(labels: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels relative to a slice of the vocabulary, clamped to it, and whether they are in it; both [rows]."""
    is_here = (labels >= part.start) & (labels < part.stop)
    return (labels - part.start).clamp(0, part.stop - part.start - 1), is_here


def _backward_by_rows(
    head: SlicedHead,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    grad: torch.Tensor,
    grads: _Gradients,
    kept: Sequence[torch.Tensor],
) -> None:
    everywhere = head.smoothing / len(weight)
    for i, part in enumerate(_slices(len(rows), head.slice_size)):

        def grad_of(logits: torch.Tensor, part: slice = part) -> torch.Tensor:
            probs = logits.log_softmax(dim=-1).exp_()
            return _grad_logits(probs, labels[part], grad[part], grad[part] * (1 - head.smoothing), everywhere)

        linear = kept[i] if kept else F.linear(rows[part], weight, bias)
        grads.add(part, slice(0, len(weight)), head.logits_backward(grad_of, linear))


def _backward_by_vocabulary(
    head: SlicedHead,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    normalisers: torch.Tensor,
    grad: torch.Tensor,
    grads: _Gradients,
    kept: Sequence[torch.Tensor],
) -> None:
    everywhere = head.smoothing / len(weight)
    for i, part in enumerate(_slices(len(weight), head.slice_size)):

        def grad_of(logits: torch.Tensor, part: slice = part) -> torch.Tensor:
            probs = logits.sub_(normalisers[:, None]).exp_()
            place, is_here = _places(labels, part)
            at_label = torch.where(is_here, grad * (1 - head.smoothing), 0)
            return _grad_logits(probs, place, grad, at_label, everywhere)

        linear = kept[i] if kept else F.linear(rows, weight[part], _part_of(bias, part))
        grads.add(slice(0, len(rows)), part, head.logits_backward(grad_of, linear))


def _grad_logits(
    probs: torch.Tensor, labels: torch.Tensor, grad: torch.Tensor, at_label: torch.Tensor, everywhere: float
) -> torch.Tensor:
    """Turn probabilities into the logits' gradient in place: grad * (everywhere - probs), plus a term at the label.

    Args:
        probs: [rows, tokens]; overwritten.
        labels: int64 [rows], all within the tokens.
        grad: gradient of each row's log-probability, [rows].
        at_label: additional gradient of the label, [rows].
        everywhere: target probability of every token.

    Returns:
        `probs`.
    """
    if everywhere:
        probs.sub_(everywhere)
    probs.mul_(grad.neg()[:, None])
    return probs.scatter_add_(1, labels[:, None], at_label[:, None])


class _Gradients:
    """Sums the gradients of rows, weight and bias over the slices; a sum of several parts is in float32.

    Args:
        needs: whether rows, weight and bias each need a gradient.
        head: the way in which logits are sliced.
        rows: [rows, hidden_size].
        weight: [tokens, hidden_size].
        place: takes the weight's gradient, each slice once; None: the gradient is allocated here.
    """

    def __init__(
        self,
        needs: Sequence[bool],
        head: SlicedHead,
        rows: torch.Tensor,
        weight: torch.Tensor,
        place: GradientPlace | None,
    ) -> None:
        self._rows, self._weight, self._place = rows, weight, place
        sum_dtype = _sum_dtype(rows.dtype)
        row_dtype, weight_dtype = (rows.dtype, sum_dtype) if head.by_rows else (sum_dtype, weight.dtype)
        self._of_rows = torch.zeros_like(rows, dtype=row_dtype) if needs[0] else None
        self._of_weight = torch.zeros_like(weight, dtype=weight_dtype) if needs[1] and place is None else None
        self._of_bias = weight.new_zeros(len(weight), dtype=sum_dtype) if needs[2] else None

    def add(self, row_part: slice, token_part: slice, grad_logits: torch.Tensor) -> None:
        """Add the contribution of a slice's logits.

        Args:
            row_part: the slice's rows.
            token_part: the slice's tokens.
            grad_logits: gradient of the slice's logits, [rows, tokens] of the weight's dtype.
        """
        if self._of_rows is not None:
            _add_product(self._of_rows[row_part], grad_logits, self._weight[token_part])
        if self._place is not None or self._of_weight is not None:
            self._add_to_weight(token_part, grad_logits.T, self._rows[row_part])
        if self._of_bias is not None:
            self._of_bias[token_part] += grad_logits.sum(dim=0, dtype=self._of_bias.dtype)

    def _add_to_weight(self, token_part: slice, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add `left @ right` to the gradient of some tokens, part by part.

        With few rows a slice is the whole vocabulary. Its product would exist once more in full: on its way to the
        place, or in float32 inside an operator that has no instructions for half precision.
        """
        for part in _slices(len(left), default_slice_size(left.device, right.shape[1])):
            tokens = slice(token_part.start + part.start, token_part.start + part.stop)
            if self._place is not None:
                self._place.add(tokens, left[part] @ right)
            elif self._of_weight is not None:
                _add_product(self._of_weight[tokens], left[part], right)

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of rows, weight and bias; None if none was needed, or if the place has it."""
        dtype = self._weight.dtype
        of_rows, of_weight, of_bias = (
            None if grad is None else grad.to(dtype) for grad in (self._of_rows, self._of_weight, self._of_bias)
        )
        return of_rows, of_weight, of_bias


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` in place to a total, which may have a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    # The product first exists in the narrow dtype, one part of the whole at a time.
    for part in _slices(len(total), default_slice_size(total.device, total.shape[1])):
        total[part] += left[part] @ right
