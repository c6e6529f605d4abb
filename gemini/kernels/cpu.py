"""Native CPU kernels; they block, and run in the calling thread without the interpreter lock.

Every instruction set gives the same bits (see native/include/gemini_native.h). This module turns tensors into
addresses; it knows neither chunks nor threads.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemini._native import ffi, lib
from gemini.errors import ConfigError
from gemini.kernels.adam_tile import (
    FLOAT_DTYPES,
    AdamHyper,
    AdamSegment,
    AdamTile,
    SegmentFactors,
    StateFormat,
    check_tensor,
    segment_factors,
    state_format_of,
)

__all__ = [
    "AdamHyper",
    "AdamSegment",
    "AdamTile",
    "GradMode",
    "Isa",
    "SegmentFactors",
    "StateFormat",
    "adam_update",
    "cast",
    "join_master",
    "resolve_isa",
    "segment_factors",
    "split_master",
    "state_format_of",
    "store_gradient",
    "sum_parts",
    "supported_isas",
]

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # gn_dtype


class Isa(enum.Enum):
    """An instruction set; values are gn_isa."""

    AUTO = 0
    SCALAR = 1
    AVX2 = 2
    AVX512 = 3
    NEON = 4

    @property
    def code(self) -> int:
        """Number in the native layer."""
        return int(self.value)


class GradMode(enum.Enum):
    """Operation on a gradient; values are gn_grad_mode."""

    STORE = 0
    """dst = convert(src)"""
    ADD = 1
    """dst = dst + convert(src), in float32"""


def supported_isas() -> tuple[Isa, ...]:
    """Return the instruction sets that this processor and this build have, without AUTO."""
    return tuple(isa for isa in Isa if isa is not Isa.AUTO and lib.gn_isa_check(isa.code) == 0)


def resolve_isa(name: str) -> Isa:
    """Turn a configuration string into an instruction set that runs here.

    Args:
        name: "auto", "scalar", "avx2", "avx512" or "neon".

    Returns:
        The instruction set; for "auto" the best one, never Isa.AUTO.

    Raises:
        ConfigError: the name is unknown or the machine lacks it.
    """
    if name == "auto":
        return Isa(lib.gn_isa_best())
    supported = supported_isas()
    for isa in supported:
        if isa.name.lower() == name:
            return isa
    names = ", ".join(f'"{isa.name.lower()}"' for isa in supported)
    raise ConfigError(f'isa: expected "auto" or one this machine supports ({names}), got {name!r}')


def adam_update(tile: AdamTile, *, isa: Isa = Isa.AUTO) -> None:
    """Apply one Adam or AdamW update, in place or from another place. Blocking, one thread.

    Args:
        tile: tensors and hyper-parameters; working, master, momentum and variance are overwritten.
        isa: instruction set to use; the result is the same for all.

    Raises:
        ConfigError: the machine lacks this instruction set.

    Source: Loshchilov & Hutter 2019, Algorithm 2. Same order of operations as torch.optim.AdamW; agreement is
    asserted in tests/kernels/test_cpu_adam.py.
    """
    args, _segments = make_adam_args(tile, isa)
    check_status(lib.gn_adam_update(args), "adam_update", isa)


def split_master(working: Tensor, residual: Tensor, master: Tensor, *, isa: Isa = Isa.AUTO) -> None:
    """Split float32 masters into bfloat16 working weights and int16 residuals, losslessly. Blocking.

    Args:
        working: bfloat16 [numel]; overwritten with the nearest bfloat16, ties away from zero.
        residual: int16 [numel]; overwritten with the remaining bits.
        master: float32 [numel]; read only.
        isa: instruction set to use.

    Raises:
        ValueError: a tensor is not 1D contiguous on the CPU, or dtypes or lengths are wrong.
        ConfigError: the machine lacks this instruction set.
    """
    pointers = _split_pointers(working, residual, master)
    status = lib.gn_split_master(*pointers, master.numel(), isa.code)
    check_status(status, "split_master", isa)


def join_master(master: Tensor, working: Tensor, residual: Tensor, *, isa: Isa = Isa.AUTO) -> None:
    """Rebuild float32 masters from working weights and residuals; inverse of split_master. Blocking.

    Args:
        master: float32 [numel]; overwritten.
        working: bfloat16 [numel]; read only.
        residual: int16 [numel]; read only.
        isa: instruction set to use.

    Raises:
        ValueError: a tensor is not 1D contiguous on the CPU, or dtypes or lengths are wrong.
        ConfigError: the machine lacks this instruction set.
    """
    to_working, to_residual, to_master = _split_pointers(working, residual, master)
    status = lib.gn_join_master(to_master, to_working, to_residual, master.numel(), isa.code)
    check_status(status, "join_master", isa)


def cast(dst: Tensor, src: Tensor, *, isa: Isa = Isa.AUTO) -> None:
    """Convert elements, rounding to nearest even; a NaN stays a NaN of the same sign. Blocking.

    Args:
        dst: float32, bfloat16 or float16 [numel]; overwritten; must not overlap src.
        src: float32, bfloat16 or float16 [numel]; read only.
        isa: instruction set to use.

    Raises:
        ValueError: a tensor is not 1D contiguous on the CPU, or dtypes or lengths are wrong.
        ConfigError: the machine lacks this instruction set.
    """
    check_tensor("cast: src", src, FLOAT_DTYPES, src.numel())
    check_tensor("cast: dst", dst, FLOAT_DTYPES, src.numel())
    codes = _DTYPE_CODES[dst.dtype], _DTYPE_CODES[src.dtype]
    status = lib.gn_cast(address_of(dst), codes[0], address_of(src), codes[1], src.numel(), isa.code)
    check_status(status, "cast", isa)


def store_gradient(dst: Tensor | None, src: Tensor, *, mode: GradMode = GradMode.STORE, isa: Isa = Isa.AUTO) -> float:
    """Store or add one gradient and return the sum of squares of the result. Blocking, one thread.

    Args:
        dst: [numel] of src's dtype or float32 (float32 if mode is ADD); overwritten. May be src itself with STORE.
            None with STORE: nothing is stored, only the sum is computed.
        src: float32, bfloat16 or float16 [numel]; read only.
        mode: store or add.
        isa: instruction set to use.

    Returns:
        Sum of squares of dst (of src if dst is None), in the fixed order that gn_grad_store documents.

    Raises:
        ValueError: a tensor is not 1D contiguous on the CPU, or dtypes, lengths or mode do not fit.
        ConfigError: the machine lacks this instruction set.
    """
    sumsq = ffi.new("double *")
    check_status(lib.gn_grad_store(make_grad_args(dst, src, mode, isa, sumsq)), "store_gradient", isa)
    return float(sumsq[0])


def sum_parts(dst: Tensor, parts: Sequence[Tensor], *, divisor: int = 1, isa: Isa = Isa.AUTO) -> None:
    """Add tensors in float32, one after another in their order, divide, and round once. Blocking, one thread.

    Args:
        dst: [numel] of the parts' dtype or float32; overwritten. May be one of the parts if it has their dtype.
        parts: float32, bfloat16 or float16 [numel], all of one dtype; read only.
        divisor: divides the sum; exact as a float32.
        isa: instruction set to use.

    Raises:
        ValueError: a tensor is not 1D contiguous on the CPU, dtypes or lengths differ, or there are no parts.
        ConfigError: the machine lacks this instruction set.
    """
    args, _pointers = make_sum_args(dst, parts, divisor, isa)
    check_status(lib.gn_sum_parts(args), "sum_parts", isa)


# ------------------------------------------------------------------ shared with the pool, not public


def address_of(tensor: Tensor | None) -> Any:
    """Return a void pointer to a tensor's first element; the caller keeps the tensor alive."""
    return ffi.NULL if tensor is None else ffi.cast("void *", tensor.data_ptr())


def check_status(status: int, operation: str, isa: Isa) -> None:
    """Turn a native status into an exception."""
    if status == 0:
        return
    if status == -errno.ENOTSUP:
        names = ", ".join(supported.name for supported in supported_isas())
        raise ConfigError(f"{operation}: this machine does not support {isa.name}; it supports {names}")
    if status == -errno.ENOMEM:
        raise MemoryError(f"{operation}: no memory for the job")
    raise ValueError(f"{operation}: {os.strerror(-status)} (errno {-status})")


def make_adam_args(tile: AdamTile, isa: Isa) -> tuple[Any, Any]:
    """Return a gn_adam_args and the segment array it points to; the caller keeps both and the tensors alive."""
    segments = ffi.new("gn_adam_segment[]", len(tile.segments))
    for native, segment in zip(segments, tile.segments, strict=True):
        factors = segment.factors
        native.begin, native.end = segment.begin, segment.end
        native.beta1_complement = factors.beta1_complement
        native.beta2, native.beta2_complement = factors.beta2, factors.beta2_complement
        native.neg_step_size, native.bias2_sqrt = factors.neg_step_size, factors.bias2_sqrt
        native.eps, native.decay, native.l2 = factors.eps, factors.decay, factors.l2
    args = ffi.new("gn_adam_args *")
    args.format = tile.state_format.value
    args.grad_dtype = _DTYPE_CODES[tile.grad.dtype]
    args.isa = isa.code
    args.grad_scale = tile.grad_scale
    args.working, args.master = address_of(tile.working), address_of(tile.master)
    args.momentum = ffi.cast("float *", tile.momentum.data_ptr())
    args.variance = ffi.cast("float *", tile.variance.data_ptr())
    args.grad = address_of(tile.grad)
    args.numel = tile.working.numel()
    args.segments, args.num_segments = segments, len(tile.segments)
    if tile.source is not None:
        source = tile.source
        args.from_working, args.from_master = address_of(source.working), address_of(source.master)
        args.from_momentum = ffi.cast("float *", address_of(source.momentum))
        args.from_variance = ffi.cast("float *", address_of(source.variance))
    return args, segments


def make_grad_args(dst: Tensor | None, src: Tensor, mode: GradMode, isa: Isa, sumsq: Any) -> Any:
    """Check the tensors of a gradient job and return its gn_grad_args, which keeps nothing alive."""
    numel = src.numel()
    check_tensor("store_gradient: src", src, FLOAT_DTYPES, numel)
    dst_dtype = src.dtype
    if dst is not None:
        allowed = (torch.float32,) if mode is GradMode.ADD else (src.dtype, torch.float32)
        check_tensor("store_gradient: dst", dst, allowed, numel)
        dst_dtype = dst.dtype
    elif mode is GradMode.ADD:
        raise ValueError("store_gradient: dst: expected a float32 tensor to add to, got None")
    args = ffi.new("gn_grad_args *")
    args.mode, args.isa = mode.value, isa.code
    args.src_dtype, args.dst_dtype = _DTYPE_CODES[src.dtype], _DTYPE_CODES[dst_dtype]
    args.src, args.dst = address_of(src), address_of(dst)
    args.numel, args.sumsq = numel, sumsq
    return args


def make_sum_args(dst: Tensor, parts: Sequence[Tensor], divisor: int, isa: Isa) -> tuple[Any, Any]:
    """Check the tensors of a sum; return its gn_sum_args and the pointers in it, which keep no tensor alive."""
    if not parts:
        raise ValueError("sum_parts: parts: expected at least one tensor, got none")
    dtype = parts[0].dtype
    for part in parts:
        check_tensor("sum_parts: part", part, (dtype,) if dtype in FLOAT_DTYPES else FLOAT_DTYPES, dst.numel())
    check_tensor("sum_parts: dst", dst, (dtype, torch.float32), dst.numel())
    pointers = ffi.new("void *[]", [address_of(part) for part in parts])
    args = ffi.new("gn_sum_args *")
    args.dtype, args.dst_dtype, args.isa = _DTYPE_CODES[dtype], _DTYPE_CODES[dst.dtype], isa.code
    args.num_parts, args.parts = len(parts), ffi.cast("void const * const *", pointers)
    args.dst, args.numel, args.divisor = address_of(dst), dst.numel(), float(divisor)
    return args, pointers


def _split_pointers(working: Tensor, residual: Tensor, master: Tensor) -> tuple[Any, Any, Any]:
    numel = master.numel()
    check_tensor("master", master, (torch.float32,), numel)
    check_tensor("working", working, (torch.bfloat16,), numel)
    check_tensor("residual", residual, (torch.int16,), numel)
    return (
        ffi.cast("uint16_t *", working.data_ptr()),
        ffi.cast("int16_t *", residual.data_ptr()),
        ffi.cast("float *", master.data_ptr()),
    )
