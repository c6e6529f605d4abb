"""The gradient store and its sum of squares as one Triton launch and a few tiny additions.

Knows tensors only. Importing this module needs Triton: import it through
gemini.kernels.device.select_device_kernels, which does without.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemini.kernels.cpu import GradMode
from gemini.kernels.device_tile import SUM_BLOCK_NUMEL, check_gradient, fold_halves, new_block_sums
from gemini.kernels.triton_adam import as_float32, pass_bits

__all__ = ["NUM_WARPS", "gradient_kernel", "triton_store_gradient"]

NUM_WARPS = 8
"""Warps of one program: 16 elements a thread."""


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


def triton_store_gradient(dst: Tensor | None, src: Tensor, *, mode: GradMode) -> Tensor:
    """Store or add a gradient and return the sum of squares of the result; as device_store_gradient, without copies.

    Args:
        dst: [numel], contiguous, of src's dtype or float32; overwritten. None with STORE: only the sum is wanted.
        src: gradient, [numel], contiguous, float32, bfloat16 or float16; read only. May be dst with STORE.
        mode: STORE replaces dst; ADD adds to it in float32, then dst must be float32.

    Returns:
        The sum, float64 [] on src's device, valid on the current stream.

    Raises:
        ValueError: a dtype, shape or device does not fit.
    """
    check_gradient(dst, src, mode)
    block_sums = new_block_sums(src)
    num_blocks = -(-src.numel() // SUM_BLOCK_NUMEL)
    if num_blocks:
        with torch.cuda.device(src.get_device()):
            gradient_kernel[(num_blocks,)](
                pass_bits(src if dst is None else dst),
                pass_bits(src),
                block_sums,
                src.numel(),
                MODE=2 if dst is None else mode.value,
                BLOCK_NUMEL=SUM_BLOCK_NUMEL,
                LOG2_BLOCK_NUMEL=SUM_BLOCK_NUMEL.bit_length() - 1,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    return fold_halves(block_sums)
