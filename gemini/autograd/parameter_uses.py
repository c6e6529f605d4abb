"""torch functions whose parameters' gradients may bypass autograd: embeddings and tied linear layers.

See [Note: Gradients past autograd] in gemini.autograd.gradient_sink.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gemini.autograd.gradient_sink import GradientUse, use_of

__all__ = ["embedding", "separate_use"]


def embedding(
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """Look up embeddings as `torch.nn.functional.embedding`; the gradient consists of the rows that were looked up.

    Args:
        token_ids: int [...].
        weight: [num_embeddings, ...].
        padding_idx: row without a gradient.
        max_norm: as in torch; with this and the last two options, torch's own function runs.
        norm_type: as in torch.
        scale_grad_by_freq: as in torch.
        sparse: as in torch.

    Returns:
        Rows of the weight, [..., ...].
    """
    is_plain = max_norm is None and not scale_grad_by_freq and not sparse
    use = use_of(weight) if is_plain else None
    if use is None:
        return F.embedding(token_ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += len(weight)
    looked_up: torch.Tensor = _Embedding.apply(token_ids, weight, padding_idx, use)  # type: ignore[no-untyped-call]
    return looked_up


def separate_use(weight: torch.Tensor) -> torch.Tensor:
    """Return a view of a parameter whose gradient is delivered separately from those of its other uses.

    Args:
        weight: any tensor; returned itself if it has no sink.

    Returns:
        The view, of the same shape.
    """
    use = use_of(weight)
    if use is None:
        return weight
    view: torch.Tensor = _SeparateUse.apply(weight, use)  # type: ignore[no-untyped-call]
    return view


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, token_ids: torch.Tensor, weight: torch.Tensor, padding_idx: int, use: GradientUse
    ) -> torch.Tensor:
        ctx.save_for_backward(token_ids)
        ctx.num_embeddings, ctx.padding_idx, ctx.use = len(weight), padding_idx, use
        return F.embedding(token_ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None, None, None]:
        (token_ids,) = ctx.saved_tensors
        is_open = ctx.use.is_open()
        writing = ctx.use.sink.write() if is_open else None
        if writing is not None:
            with writing as place:
                place.add_rows(*_sum_rows(gradient, token_ids, ctx.padding_idx))
            return None, None, None, None
        dense = torch.ops.aten.embedding_dense_backward(gradient, token_ids, ctx.num_embeddings, ctx.padding_idx, False)
        if is_open:
            ctx.use.sink.put(dense)
            return None, None, None, None
        return None, dense, None, None


def _sum_rows(gradient: torch.Tensor, token_ids: torch.Tensor, padding_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum an embedding's gradient by row, in torch's order for the dense gradient.

    Args:
        gradient: gradient of the looked up rows, [..., hidden_size].
        token_ids: the rows, int [...].
        padding_idx: row to leave out; negative for none.

    Returns:
        Rows, sorted int64 [num_rows], and their gradients, [num_rows, hidden_size].
    """
    flat_ids, flat = token_ids.reshape(-1), gradient.reshape(token_ids.numel(), gradient.shape[-1])
    if padding_idx >= 0:
        is_kept = flat_ids != padding_idx
        flat_ids, flat = flat_ids[is_kept], flat[is_kept]
    rows, places = torch.unique(flat_ids, return_inverse=True)
    return rows.long(), torch.ops.aten.embedding_dense_backward(flat, places, len(rows), -1, False)


class _SeparateUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, use: GradientUse) -> torch.Tensor:
        ctx.use = use
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.use.is_open():
            return gradient, None
        ctx.use.sink.put(gradient)
        return None, None
