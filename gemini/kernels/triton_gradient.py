"""The gradient store and its sum of squares in two Triton launches, or three for more than 16 million elements.

Knows tensors only. Importing this module needs Triton: import it through
gemini.kernels.device.select_device_kernels, which does without.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemini.kernels.cpu import GradMode
from gemini.kernels.device_tile import SUM_BLOCK_NUMEL, check_gradient
from gemini.kernels.triton_adam import as_float32, pass_bits

__all__ = [
    "NUM_WARPS",
    "FoldLaunch",
    "fold_kernel",
    "fold_sums",
    "gradient_kernel",
    "plan_folds",
    "triton_store_gradient",
]

NUM_WARPS = 8
"""Warps of one program: 16 elements a thread."""
_FOLDED = 4096
"""Sums that a program folds at most."""
_COLUMNS = 1024
"""Sums that the first of two folds leaves."""


@triton.jit
def gradient_kernel(
    dst,  # of src's type or *f32; anything if MODE is 2
    src,  # *int16 (the bits of bf16), *f16 or *f32
    block_sums,  # *f64 [num_blocks]
    numel,
    MODE: tl.constexpr,  # 0: store, 1: add, 2: only sum
    BLOCK_NUMEL: tl.constexpr,
    LOG2_BLOCK_NUMEL: tl.constexpr,
):
    """Store or add one block and reduce it in the order of gn_grad_store."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK_NUMEL + tl.arange(0, BLOCK_NUMEL)
    inside = offsets < numel
    raw = tl.load(src + offsets, mask=inside, other=0)
    values = as_float32(raw)
    if MODE == 1:
        values = tl.load(dst + offsets, mask=inside, other=0.0) + values
    if MODE != 2:
        if dst.dtype.element_ty == tl.float32:
            tl.store(dst + offsets, values, mask=inside)
        else:
            tl.store(dst + offsets, raw, mask=inside)
    sums = values.to(tl.float64)
    sums = sums * sums
    # One addition of two halves per turn: a reduction over the whole block would leave the order to Triton.
    for level in tl.static_range(1, LOG2_BLOCK_NUMEL + 1):
        sums = tl.sum(tl.reshape(sums, (2, BLOCK_NUMEL >> level)), axis=0)
    tl.store(block_sums + block + tl.arange(0, 1), sums)


@triton.jit
def fold_kernel(
    sums,  # *f64 [num_sums]
    folded,  # *f64 [stride]
    num_sums,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOG2_ROWS: tl.constexpr,
):
    """Fold the rows of sums, seen as a matrix whose rows are `stride` long, as fold_halves does; zeros follow them."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    places = tl.arange(0, ROWS)[:, None] * stride + columns[None, :]
    values = tl.load(sums + places, mask=places < num_sums, other=0.0)
    for level in tl.static_range(1, LOG2_ROWS + 1):
        values = tl.sum(tl.reshape(values, (2, ROWS >> level, COLUMNS)), axis=0)
    tl.store(folded + columns, tl.reshape(values, (COLUMNS,)))


class FoldLaunch(NamedTuple):
    """One launch of fold_kernel."""

    grid: int
    rows: int
    columns: int
    stride: int


def plan_folds(num_sums: int) -> list[FoldLaunch]:
    """Plan the launches that fold sums into one. Only a few shapes occur, because each must be compiled.

    Args:
        num_sums: how many; at most 2^22.

    Returns:
        The launches, in order; each folds what the one before has left.

    Raises:
        ValueError: there are more.
    """
    if num_sums <= 1:
        return []
    if num_sums <= _FOLDED:
        return [FoldLaunch(grid=1, rows=64 if num_sums <= 64 else _FOLDED, columns=1, stride=1)]
    rows = next((rows for rows in (16, 256, _FOLDED) if num_sums <= rows * _COLUMNS), None)
    if rows is None:
        raise ValueError(
            f"store_gradient: src: expected at most {SUM_BLOCK_NUMEL * _FOLDED * _COLUMNS} elements, got "
            f"{num_sums} blocks of {SUM_BLOCK_NUMEL}"
        )
    columns = _FOLDED // rows
    return [
        FoldLaunch(grid=_COLUMNS // columns, rows=rows, columns=columns, stride=_COLUMNS),
        FoldLaunch(grid=1, rows=_COLUMNS, columns=1, stride=1),
    ]


def triton_store_gradient(dst: Tensor | None, src: Tensor, *, mode: GradMode) -> Tensor:
    """Store or add a gradient and return the sum of squares of the result; as device_store_gradient, without copies.

    Args:
        dst: [numel], contiguous, of src's dtype or float32; overwritten. None with STORE: only the sum is wanted.
        src: gradient, [numel], contiguous, float32, bfloat16 or float16; read only. May be dst with STORE.
        mode: STORE replaces dst; ADD adds to it in float32, then dst must be float32.

    Returns:
        The sum, float64 [] on src's device, valid on the current stream.

    Raises:
        ValueError: a dtype, shape or device does not fit, or there are more than 2^34 elements.
    """
    check_gradient(dst, src, mode)
    num_blocks = -(-src.numel() // SUM_BLOCK_NUMEL)
    if num_blocks == 0:
        return src.new_zeros((), dtype=torch.float64)
    sums = src.new_empty(num_blocks, dtype=torch.float64)
    with torch.cuda.device(src.get_device()):
        gradient_kernel[(num_blocks,)](
            pass_bits(src if dst is None else dst),
            pass_bits(src),
            sums,
            src.numel(),
            MODE=2 if dst is None else mode.value,
            BLOCK_NUMEL=SUM_BLOCK_NUMEL,
            LOG2_BLOCK_NUMEL=SUM_BLOCK_NUMEL.bit_length() - 1,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
        return fold_sums(sums)


def fold_sums(sums: Tensor) -> Tensor:
    """Return the sum of sums in the order of gn_grad_store.

    Args:
        sums: float64 [at least 1, at most 2^22].

    Returns:
        float64 [] on the same device.

    Raises:
        ValueError: there are more.
    """
    for fold in plan_folds(sums.numel()):
        folded = sums.new_empty(fold.grid * fold.columns)
        fold_kernel[(fold.grid,)](
            sums,
            folded,
            sums.numel(),
            fold.stride,
            ROWS=fold.rows,
            COLUMNS=fold.columns,
            LOG2_ROWS=fold.rows.bit_length() - 1,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
        sums = folded
    return sums.view(())
