"""The Adam update and the gradient store for tensors in device memory, bit-identical to the native layer.

There are two implementations: separate torch operations, which run on any device (host memory may act as one), and
Triton kernels. `select_device_kernels` chooses. Knows tensors and segments, but not chunks, tiers or streams: all work
is issued on the current stream of the tensors' device, and no call waits for the device.

[Note: Exact rounding on a device]
Every operation of gn_adam_update is rounded to float32 on its own. Deviations of a device, or of torch, and remedies:
  - a * b + c contracted into a fused operation: here one torch operation each; Triton's `enable_fp_fusion=False`.
  - torch divides by a Python number by multiplying with its reciprocal on CUDA: the divisor is a 0-dim tensor there.
  - torch.sqrt of float32 is not correctly rounded on the CPU (MKL; one unit off for one input in six): it is taken in
    float64 and rounded to float32, which is exact even if float64's is one unit off, because the root of a float32 is
    never closer than 2^-50 (relative) to the middle of two float32. Triton: sqrt_rn.
  - approximate division: Triton's div_rn.
  - subnormal numbers flushed to zero: the first use of a device tests Triton for it. On the CPU torch flushes only if
    the program has called torch.set_flush_denormal.
NaN is NaN everywhere, but which NaN is not fixed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemini.kernels.adam_tile import AdamHyper, AdamSegment, SegmentFactors, StateFormat
from gemini.kernels.cpu import GradMode
from gemini.kernels.device_tile import (
    SUM_BLOCK_NUMEL,
    DeviceChunk,
    DeviceTile,
    RecordOffsets,
    check_gradient,
    fold_halves,
)

__all__ = [
    "TORCH_KERNELS",
    "DeviceKernels",
    "device_adam_update",
    "device_store_gradient",
    "select_device_kernels",
    "update_tiles",
]

logger = logging.getLogger(__name__)

_PROBE_HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-30, weight_decay=0.1)
_SLICE_NUMEL = 1 << 20  # elements a torch operation works on at a time; bounds the temporaries


class AdamUpdate(Protocol):
    """Signature of a chunk's Adam update."""

    def __call__(self, chunk: DeviceChunk) -> None:
        """Update a chunk in place; see update_tiles."""


class StoreGradient(Protocol):
    """Signature of a gradient store."""

    def __call__(self, dst: Tensor | None, src: Tensor, *, mode: GradMode) -> Tensor:
        """Store or add a gradient; see device_store_gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKernels:
    """The kernels for one device."""

    name: str
    """Name of the implementation: "triton" or "torch"."""
    adam_update: AdamUpdate
    store_gradient: StoreGradient


def select_device_kernels(device: torch.device) -> DeviceKernels:
    """Choose the kernels for a device and log the choice: Triton's on CUDA if they work and agree, else torch's.

    Waits for the device once: Triton's kernels are compared with torch's on a small tile, because older versions of
    Triton (3.2 and 3.4; not 3.6 and later) flush subnormal numbers in divisions and roots.

    Args:
        device: the tensors' device.

    Returns:
        The kernels; keep them, because choosing takes too long for a step.
    """
    kernels = TORCH_KERNELS
    if device.type == "cuda":
        try:
            kernels = _triton_kernels(device)
        except Exception as error:  # Triton's compiler and launcher raise errors of any type
            logger.warning("optimizer kernels on %s: not Triton's but slower ones of torch: %s", device, error)
    logger.info("optimizer kernels on %s: %s", device, kernels.name)
    return kernels


def _triton_kernels(device: torch.device) -> DeviceKernels:
    """Return Triton's kernels once they have given torch's bits on a small tile."""
    from gemini.kernels.triton_adam import triton_adam_update
    from gemini.kernels.triton_gradient import triton_store_gradient

    pairs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected, found = _make_probe(device, dtype), _make_probe(device, dtype)
        update_tiles(expected)
        triton_adam_update(found)
        pairs += [(expected.working, found.working), (expected.records, found.records)]
        sums = [
            store(None, expected.grad, mode=GradMode.STORE) for store in (device_store_gradient, triton_store_gradient)
        ]
        pairs.append((sums[0], sums[1]))
    if not all(torch.equal(*pair) for pair in pairs):
        raise RuntimeError("this version of Triton rounds differently; install the one that came with torch or a newer")
    return DeviceKernels(name="triton", adam_update=triton_adam_update, store_gradient=triton_store_gradient)


def _make_probe(device: torch.device, dtype: torch.dtype) -> DeviceChunk:
    """Return two tiles whose values and gradients span all magnitudes of float32, subnormal numbers included."""
    tile_numel, numel = 4096, 5000
    values = torch.linspace(-148.0, 60.0, numel, device=device).exp2_()
    # All parts of a record are as long as a tile of float32: what is behind a shorter one is padding.
    part = 4 * tile_numel
    offsets = RecordOffsets(momentum=part, variance=2 * part, nbytes=3 * part)
    chunk = DeviceChunk(
        working=values.to(dtype, copy=True),
        records=torch.zeros(6 * part, dtype=torch.uint8, device=device),
        grad=values * 0.9,
        tile_numel=tile_numel,
        offsets=offsets,
        last_offsets=offsets,
        grad_scale=0.7,
        segments=(AdamSegment(begin=1, end=numel, hyper=_PROBE_HYPER, step=3),),
    )
    masters = torch.arange(numel, device=device) if dtype == torch.bfloat16 else values
    for tile, begin in zip(chunk.tiles(), (0, tile_numel), strict=True):
        here = slice(begin, begin + tile.working.numel())
        tile.momentum.copy_(-values[here])
        tile.variance.copy_(values[here] * 0.3)
        if tile.master is not None:
            tile.master.copy_(masters[here])
    return chunk


def update_tiles(chunk: DeviceChunk) -> None:
    """Apply one Adam or AdamW update to a chunk in place with torch operations, tile by tile.

    Args:
        chunk: tensors and hyper-parameters; elements in no segment are left untouched.
    """
    for tile in chunk.tiles():
        device_adam_update(tile)


def device_adam_update(tile: DeviceTile) -> None:
    """Apply one Adam or AdamW update in place with torch operations.

    Takes about 20 bytes of temporaries per element of a slice of 2^20 elements. The result is valid on the current
    stream; the call does not wait for it.

    Args:
        tile: tensors and hyper-parameters; elements in no segment are left untouched.

    Source: gn_adam_update in native/include/gemini_native.h; see [Note: Exact rounding on a device].
    """
    for segment in tile.segments:
        bias2_sqrt = torch.full((), segment.factors.bias2_sqrt, dtype=torch.float32, device=tile.working.device)
        for begin in range(segment.begin, segment.end, _SLICE_NUMEL):
            part = slice(begin, min(begin + _SLICE_NUMEL, segment.end))
            _update_slice(tile, part, segment.factors, bias2_sqrt)


def _update_slice(tile: DeviceTile, part: slice, factors: SegmentFactors, bias2_sqrt: Tensor) -> None:
    """Update one slice; `bias2_sqrt` is float32 [] on the tile's device."""
    master = _load_master(tile, part)
    momentum, variance = tile.momentum[part], tile.variance[part]
    grad = tile.grad[part].to(torch.float32) * tile.grad_scale
    if factors.l2 != 0.0:
        grad += master * factors.l2
    master = master * factors.decay
    momentum += (grad - momentum) * factors.beta1_complement
    variance *= factors.beta2
    variance += (grad * factors.beta2_complement) * grad
    del grad
    denominator = variance.to(torch.float64).sqrt_().to(torch.float32)
    denominator /= bias2_sqrt
    denominator += factors.eps
    master += (momentum * factors.neg_step_size) / denominator
    _store_master(tile, part, master)


def _load_master(tile: DeviceTile, part: slice) -> Tensor:
    """Return the float32 masters of a slice; may be a view of the tile."""
    working = tile.working[part]
    if tile.master is None:
        return working
    master = tile.master[part]
    if tile.state_format is StateFormat.FP16_MASTER:
        return master
    bits = working.view(torch.int16).to(torch.int32) << 16
    bits += master
    return bits.view(torch.float32)


def _store_master(tile: DeviceTile, part: slice, master: Tensor) -> None:
    """Write float32 masters back to a slice and derive the working weights."""
    working = tile.working[part]
    if tile.master is not None and tile.state_format is StateFormat.SPLIT_BF16:
        # The residual is the low half unchanged: working << 16 has zeros there.
        bits = master.view(torch.int32)
        tile.master[part].copy_(bits)
        working.view(torch.int16).copy_((bits + 0x8000) >> 16)
        return
    if tile.master is not None:
        tile.master[part].copy_(master)
    working.copy_(master)


def device_store_gradient(dst: Tensor | None, src: Tensor, *, mode: GradMode) -> Tensor:
    """Store or add a gradient with torch operations and return the sum of squares of the result.

    Takes about 16 bytes of temporaries per element of a slice of 2^20 elements. The result is valid on the current
    stream; the call does not wait for it.

    Args:
        dst: [numel], contiguous, of src's dtype or float32; overwritten. None with STORE: only the sum is wanted.
        src: gradient, [numel], contiguous, float32, bfloat16 or float16; read only. May be dst with STORE.
        mode: STORE replaces dst; ADD adds to it in float32, then dst must be float32.

    Returns:
        The sum, float64 [] on src's device; infinite or NaN exactly if an element is.

    Raises:
        ValueError: a dtype, shape or device does not fit.

    Source: gn_grad_store in native/include/gemini_native.h, bit for bit.
    """
    check_gradient(dst, src, mode)
    num_blocks = -(-src.numel() // SUM_BLOCK_NUMEL)
    padded = 1 << max(num_blocks - 1, 0).bit_length()
    block_sums = torch.zeros(padded, dtype=torch.float64, device=src.device)
    for begin in range(0, src.numel(), _SLICE_NUMEL):
        values = src[begin : begin + _SLICE_NUMEL]
        if dst is not None:
            target = dst[begin : begin + _SLICE_NUMEL]
            if mode is GradMode.ADD:
                target += values
            else:
                target.copy_(values)
            values = target
        first = begin // SUM_BLOCK_NUMEL
        num_here = -(-values.numel() // SUM_BLOCK_NUMEL)
        squares = torch.zeros(num_here * SUM_BLOCK_NUMEL, dtype=torch.float64, device=src.device)
        squares[: values.numel()] = values
        squares *= squares
        block_sums[first : first + num_here] = fold_halves(squares.view(num_here, SUM_BLOCK_NUMEL))
    return fold_halves(block_sums)


TORCH_KERNELS = DeviceKernels(name="torch", adam_update=update_tiles, store_gradient=device_store_gradient)
"""Kernels for any device of torch."""
