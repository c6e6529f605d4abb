"""The Adam update as one Triton launch over a whole tile, whatever the number of segments.

Knows tensors and segments, nothing of chunks or streams. Importing this module needs Triton: import it through
gemini.kernels.device.select_device_kernels, which does without.
"""

# Triton reads the annotations of a kernel's parameters: only tl.constexpr may stand there.
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gemini.kernels.adam_tile import AdamSegment
from gemini.kernels.device_tile import DeviceTile

__all__ = [
    "BLOCK_NUMEL",
    "NUM_WARPS",
    "adam_kernel",
    "as_float32",
    "make_segment_table",
    "pass_bits",
    "triton_adam_update",
]

BLOCK_NUMEL = 1024
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
def adam_kernel(
    working,  # *int16 (the bits of bf16), *f16 or *f32
    master,  # *int16, *f32, or anything if FORMAT is 2
    momentum,  # *f32
    variance,  # *f32
    grad,  # *int16, *f16 or *f32
    bounds,  # *int64 [num_segments, 2]: begin, end
    factors,  # *f32 [num_segments, 8] in the order of gn_adam_segment
    overlaps,  # *int32 [num_blocks, 2]: first segment that overlaps the block, one past the last
    grad_scale,
    FORMAT: tl.constexpr,  # gn_state_format
    BLOCK_NUMEL: tl.constexpr,
):
    """Update what the segments cover of one block."""
    block = tl.program_id(0).to(tl.int64)
    begin = block * BLOCK_NUMEL
    offsets = begin + tl.arange(0, BLOCK_NUMEL)
    working += offsets
    master += offsets
    momentum += offsets
    variance += offsets
    grad += offsets
    for segment in range(tl.load(overlaps + block * 2), tl.load(overlaps + block * 2 + 1)):
        segment_begin = tl.load(bounds + segment * 2)
        segment_end = tl.load(bounds + segment * 2 + 1)
        factor = factors + segment * 8
        # Nearly every block lies in one segment; without a mask loads and stores are vectors.
        if (segment_begin <= begin) & (begin + BLOCK_NUMEL <= segment_end):
            _update_block(working, master, momentum, variance, grad, factor, grad_scale, None, FORMAT)
        else:
            inside = (offsets >= segment_begin) & (offsets < segment_end)
            _update_block(working, master, momentum, variance, grad, factor, grad_scale, inside, FORMAT)


def triton_adam_update(tile: DeviceTile) -> None:
    """Apply one Adam or AdamW update in place in one launch; as device_adam_update, without temporaries.

    Args:
        tile: tensors and hyper-parameters; elements in no segment are left untouched.
    """
    if not tile.segments or tile.working.numel() == 0:
        return
    table = make_segment_table(tile)
    with torch.cuda.device(tile.working.get_device()):
        adam_kernel[(table.overlaps.shape[0],)](
            pass_bits(tile.working),
            tile.working if tile.master is None else tile.master,
            tile.momentum,
            tile.variance,
            pass_bits(tile.grad),
            table.bounds,
            table.factors,
            table.overlaps,
            tile.grad_scale,
            FORMAT=tile.state_format.value,
            BLOCK_NUMEL=BLOCK_NUMEL,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


class _SegmentTable(NamedTuple):
    """What the kernel knows of the segments; see its parameters."""

    bounds: Tensor
    factors: Tensor
    overlaps: Tensor


def make_segment_table(tile: DeviceTile) -> _SegmentTable:
    """Build the segment table and copy it to the device in one asynchronous transfer.

    numpy, because torch would spread this little work over threads that have better things to do.
    """
    num_segments = len(tile.segments)
    num_blocks = -(-tile.working.numel() // BLOCK_NUMEL)
    num_bytes = [num_segments * 16, num_segments * 32, num_blocks * 8]
    device = tile.working.device
    packed = torch.empty(sum(num_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_host = np.split(packed.numpy(), np.cumsum(num_bytes)[:-1])
    bounds = on_host[0].view(np.int64).reshape(num_segments, 2)
    bounds[:] = [(segment.begin, segment.end) for segment in tile.segments]
    on_host[1].view(np.float32).reshape(num_segments, 8)[:] = [_factor_row(segment) for segment in tile.segments]
    overlaps = on_host[2].view(np.int32).reshape(num_blocks, 2)
    # A segment lies before every block from the first that starts at or behind its end, and not behind any from the
    # one it begins in.
    first_blocks_behind = -(-bounds[:, 1] // BLOCK_NUMEL)
    overlaps[:, 0] = np.bincount(first_blocks_behind, minlength=num_blocks).cumsum()[:num_blocks]
    overlaps[:, 1] = np.bincount(bounds[:, 0] // BLOCK_NUMEL, minlength=num_blocks).cumsum()[:num_blocks]

    on_device = torch.split_with_sizes(packed.to(device, non_blocking=True), num_bytes)
    return _SegmentTable(
        on_device[0].view(torch.int64).view(num_segments, 2),
        on_device[1].view(torch.float32).view(num_segments, 8),
        on_device[2].view(torch.int32).view(num_blocks, 2),
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
