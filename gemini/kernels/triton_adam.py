"""The Adam update as one Triton launch over a whole chunk, whatever the number of tiles and segments.

Knows tensors and segments, nothing of streams or of where chunks live. Importing this module needs Triton: import it
through gemini.kernels.device.select_device_kernels, which does without.
"""

# Triton reads the annotations of a kernel's parameters: only tl.constexpr may stand there.
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gemini.kernels.adam_tile import AdamSegment
from gemini.kernels.device_tile import TILE_MULTIPLE, DeviceChunk

__all__ = [
    "BLOCK_NUMEL",
    "NUM_WARPS",
    "adam_kernel",
    "as_float32",
    "kernel_arguments",
    "pass_bits",
    "triton_adam_update",
]

BLOCK_NUMEL = TILE_MULTIPLE
"""Elements of one program."""
NUM_WARPS = 8
"""Warps of one program: 4 elements a thread. With 4 warps the kernels of half precisions take 107 to 118 registers and
change layouts through shared memory; with 8 they take at most 54, and nothing is changed (ptxas 12.9, sm_89)."""


@triton.jit
def as_float32(values):
    """Convert to float32; int16 are the bits of bf16, because Triton's interpreter mistakes bf16's subnormals."""
    if values.dtype == tl.int16:
        result = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = values.to(tl.float32)
    return result


def pass_bits(tensor: Tensor) -> Tensor:
    """Return the view of a tensor that kernels take: int16 for bf16; see as_float32."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def _update_block(working, master, momentum, variance, grad, factor, grad_scale, inside, FORMAT: tl.constexpr):
    """Update the elements of a block where `inside` is true, or all of them if it is None.

    The pointers are blocks of pointers, `factor` points to the 8 factors of a segment. Operations and their order are
    those of gn_adam_update. Lanes outside compute on undefined values, which are not stored.
    """
    if FORMAT == 0:
        high = tl.load(working, mask=inside).to(tl.int32)
        low = tl.load(master, mask=inside).to(tl.int32)
        p = ((high << 16) + low).to(tl.float32, bitcast=True)
    elif FORMAT == 1:
        p = tl.load(master, mask=inside)
    else:
        p = tl.load(working, mask=inside)
    g = as_float32(tl.load(grad, mask=inside)) * grad_scale
    m = tl.load(momentum, mask=inside)
    v = tl.load(variance, mask=inside)

    l2 = tl.load(factor + 7)
    if l2 != 0.0:
        g = g + l2 * p
    p = p * tl.load(factor + 6)
    m = m + tl.load(factor) * (g - m)
    v = v * tl.load(factor + 1) + (tl.load(factor + 2) * g) * g
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(factor + 4)) + tl.load(factor + 5)
    p = p + tl.div_rn(tl.load(factor + 3) * m, denominator)

    tl.store(momentum, m, mask=inside)
    tl.store(variance, v, mask=inside)
    if FORMAT == 0:
        bits = p.to(tl.int32, bitcast=True)
        tl.store(working, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(master, bits.to(tl.int16), mask=inside)
    elif FORMAT == 1:
        tl.store(master, p, mask=inside)
        tl.store(working, p.to(tl.float16), mask=inside)
    else:
        tl.store(working, p, mask=inside)


@triton.jit
def _count_below(values, num_values, limit):
    """Return how many of some sorted int64 are less than a limit."""
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0, tl.int32) + num_values
    while low < high:
        middle = (low + high) // 2
        is_below = tl.load(values + middle) < limit
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_below, high, middle)
    return low


@triton.jit
def adam_kernel(
    working,  # *int16 (the bits of bf16), *f16 or *f32
    masters,  # *int16, *f32, or anything if FORMAT is 2: the records, as masters
    state,  # *f32: the records, as momenta and variances
    grad,  # *int16, *f16 or *f32
    bounds,  # *int64 [2, num_segments]: begins, ends
    factors,  # *f32 [num_segments, 8] in the order of gn_adam_segment
    num_segments,
    grad_scale,
    blocks_per_tile,
    last_tile,  # number of the last tile, whose record has other offsets
    record_numel,  # float32 in a record; the offsets count float32 too
    momentum_offset,
    variance_offset,
    last_momentum_shift,  # what the last tile's offsets differ by
    last_variance_shift,
    FORMAT: tl.constexpr,  # gn_state_format
    BLOCK_NUMEL: tl.constexpr,
):
    """Update what the segments cover of one block, which is in one tile."""
    block = tl.program_id(0)
    begin = block.to(tl.int64) * BLOCK_NUMEL
    tile = block // blocks_per_tile
    record = tile.to(tl.int64) * record_numel
    in_tile = (block - tile * blocks_per_tile) * BLOCK_NUMEL + tl.arange(0, BLOCK_NUMEL)
    is_last = (tile == last_tile).to(tl.int32)
    momentum = state + (record + momentum_offset + is_last * last_momentum_shift) + in_tile
    variance = state + (record + variance_offset + is_last * last_variance_shift) + in_tile
    if FORMAT == 0:
        masters += 2 * record + in_tile
    else:
        masters += record + in_tile
    offsets = begin + tl.arange(0, BLOCK_NUMEL)
    working += offsets
    grad += offsets
    first = _count_below(bounds + num_segments, num_segments, begin + 1)  # those that end here or before
    for segment in range(first, _count_below(bounds, num_segments, begin + BLOCK_NUMEL)):
        segment_begin = tl.load(bounds + segment)
        segment_end = tl.load(bounds + num_segments + segment)
        factor = factors + segment * 8
        # Nearly every block lies in one segment; without a mask loads and stores are vectors.
        if (segment_begin <= begin) & (begin + BLOCK_NUMEL <= segment_end):
            _update_block(working, masters, momentum, variance, grad, factor, grad_scale, None, FORMAT)
        else:
            inside = (offsets >= segment_begin) & (offsets < segment_end)
            _update_block(working, masters, momentum, variance, grad, factor, grad_scale, inside, FORMAT)


def triton_adam_update(chunk: DeviceChunk) -> None:
    """Apply one Adam or AdamW update in place in one launch; as update_tiles, without temporaries.

    Args:
        chunk: tensors and hyper-parameters; elements in no segment are left untouched.
    """
    if not chunk.segments or chunk.working.numel() == 0:
        return
    with torch.cuda.device(chunk.working.get_device()):
        adam_kernel[(-(-chunk.working.numel() // BLOCK_NUMEL),)](
            *kernel_arguments(chunk),
            FORMAT=chunk.state_format.value,
            BLOCK_NUMEL=BLOCK_NUMEL,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def kernel_arguments(chunk: DeviceChunk) -> tuple[Tensor | float | int, ...]:
    """Return what adam_kernel takes, in its order, but for the constants; segments are copied to the device.

    The search for a block's segments is the kernel's: a table of them would have to be built, kept and sent for every
    block.
    """
    bounds, factors = _segments_on_device(chunk)
    offsets, last_offsets = chunk.offsets, chunk.last_offsets
    return (
        pass_bits(chunk.working),
        chunk.records.view(chunk.state_format.master_dtype or torch.float32),
        chunk.records.view(torch.float32),
        pass_bits(chunk.grad),
        bounds,
        factors,
        len(chunk.segments),
        chunk.grad_scale,
        chunk.tile_numel // BLOCK_NUMEL,
        chunk.num_tiles - 1,
        offsets.nbytes // 4,
        offsets.momentum // 4,
        offsets.variance // 4,
        (last_offsets.momentum - offsets.momentum) // 4,
        (last_offsets.variance - offsets.variance) // 4,
    )


def _segments_on_device(chunk: DeviceChunk) -> tuple[Tensor, Tensor]:
    """Copy bounds (int64 [2, num_segments]) and factors (float32 [num_segments, 8]) in one asynchronous transfer."""
    num_segments = len(chunk.segments)
    device = chunk.working.device
    packed = torch.empty(num_segments * 48, dtype=torch.uint8, pin_memory=device.type == "cuda")
    bounds, factors = np.split(packed.numpy(), [num_segments * 16])
    bounds.view(np.int64)[:] = [each.begin for each in chunk.segments] + [each.end for each in chunk.segments]
    factors.view(np.float32).reshape(num_segments, 8)[:] = [_factor_row(segment) for segment in chunk.segments]
    on_device = packed.to(device, non_blocking=True)
    return (
        on_device[: num_segments * 16].view(torch.int64).view(2, num_segments),
        on_device[num_segments * 16 :].view(torch.float32).view(num_segments, 8),
    )


def _factor_row(segment: AdamSegment) -> tuple[float, ...]:
    """Return the factors of a segment in the order of gn_adam_segment."""
    factors = segment.factors
    return (
        factors.beta1_complement,
        factors.beta2,
        factors.beta2_complement,
        factors.neg_step_size,
        factors.bias2_sqrt,
        factors.eps,
        factors.decay,
        factors.l2,
    )
