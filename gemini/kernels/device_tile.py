"""Input of the device kernels, and code that their implementations share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemini.kernels.adam_tile import AdamSegment, StateFormat, state_format_of
from gemini.kernels.cpu import GradMode

__all__ = ["SUM_BLOCK_NUMEL", "DeviceTile", "check_gradient", "fold_halves", "new_block_sums"]

SUM_BLOCK_NUMEL = 4096  # elements of a block of gn_grad_store's sum
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DeviceTile:
    """The tensors of one update in device memory; all 1D [numel], contiguous, on one device, not overlapping.

    It has the fields of gemini.kernels.cpu.AdamTile, but a separate type, because a native kernel must not get an
    address in device memory. The tile only refers to the tensors.

    Raises:
        ValueError: a dtype, shape or device does not fit, or the segments are not sorted, disjoint and inside the tile.
    """

    working: Tensor  # [numel] bfloat16, float16 or float32; decides the state format; overwritten
    master: Tensor | None  # [numel] int16 residual, float32 master, or None; see StateFormat; overwritten
    momentum: Tensor  # [numel] float32; overwritten
    variance: Tensor  # [numel] float32; overwritten
    grad: Tensor  # [numel] float32, bfloat16 or float16; read only
    grad_scale: float  # multiplies every gradient; rounded to float32
    segments: tuple[AdamSegment, ...]

    def __post_init__(self) -> None:
        _check_tensor("DeviceTile.working", self.working, _FLOAT_DTYPES, self.working)
        _check_tensor("DeviceTile.momentum", self.momentum, (torch.float32,), self.working)
        _check_tensor("DeviceTile.variance", self.variance, (torch.float32,), self.working)
        _check_tensor("DeviceTile.grad", self.grad, _FLOAT_DTYPES, self.working)
        master_dtype = self.state_format.master_dtype
        if self.master is not None and master_dtype is not None:
            _check_tensor("DeviceTile.master", self.master, (master_dtype,), self.working)
        elif self.master is not None or master_dtype is not None:
            found = None if self.master is None else self.master.dtype
            raise ValueError(
                f"DeviceTile.master: expected {master_dtype} for working weights of {self.working.dtype}, got {found}"
            )
        _check_segments(self.segments, self.working.numel())

    @property
    def state_format(self) -> StateFormat:
        """Format that follows from the working dtype."""
        return state_format_of(self.working.dtype)


def new_block_sums(src: Tensor) -> Tensor:
    """Return zeros for the block sums of a gradient, padded to a power of two: float64 [>= 1] on its device."""
    num_blocks = -(-src.numel() // SUM_BLOCK_NUMEL)
    return torch.zeros(1 << max(num_blocks - 1, 0).bit_length(), dtype=torch.float64, device=src.device)


def fold_halves(values: Tensor) -> Tensor:
    """Sum the last dimension, a power of two long: add its halves until one element is left, and drop it."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


def check_gradient(dst: Tensor | None, src: Tensor, mode: GradMode) -> None:
    """Raise ValueError unless the tensors fit gn_grad_store."""
    _check_tensor("store_gradient: src", src, _FLOAT_DTYPES, src)
    if dst is not None:
        dtypes = (torch.float32,) if mode is GradMode.ADD else (torch.float32, src.dtype)
        _check_tensor("store_gradient: dst", dst, dtypes, src)
    elif mode is GradMode.ADD:
        raise ValueError("store_gradient: dst: expected a float32 tensor to add to, got None")


def _check_segments(segments: tuple[AdamSegment, ...], numel: int) -> None:
    """Raise ValueError unless segments are sorted, disjoint and inside the tile."""
    previous_end = 0
    for segment in segments:
        if not previous_end <= segment.begin <= segment.end <= numel:
            raise ValueError(
                f"DeviceTile.segments: expected sorted, disjoint ranges within [0, {numel}], got "
                f"[{segment.begin}, {segment.end}) after {previous_end}"
            )
        previous_end = segment.end


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Raise ValueError unless a tensor is 1D, contiguous, of one of the dtypes and of another's length and device."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous 1D tensor, got shape {list(tensor.shape)} and stride "
            f"{list(tensor.stride())}; pass tensor.view(-1) of contiguous memory"
        )
    if tensor.numel() != like.numel():
        raise ValueError(f"{name}: expected {like.numel()} elements, got {tensor.numel()}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")
