"""Input of the device kernels, and code that their implementations share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gemini.kernels.adam_tile import AdamSegment, StateFormat, clip_segments, state_format_of
from gemini.kernels.cpu import GradMode

__all__ = [
    "SUM_BLOCK_NUMEL",
    "TILE_MULTIPLE",
    "DeviceChunk",
    "DeviceTile",
    "RecordOffsets",
    "check_gradient",
    "fold_halves",
]

SUM_BLOCK_NUMEL = 4096
"""Elements of a block of gn_grad_store's sum."""
TILE_MULTIPLE = 1024
"""The length of a tile that is not the last is a multiple of this, so that no block of a kernel is in two tiles."""
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
        _check_segments("DeviceTile.segments", self.segments, self.working.numel())

    @property
    def state_format(self) -> StateFormat:
        """Format that follows from the working dtype."""
        return state_format_of(self.working.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOffsets:
    """Where the parts of a tile's state record are, in bytes from its start; the master, if there is one, is first.

    Raises:
        ValueError: a number is not a multiple of 4.
    """

    momentum: int
    variance: int
    nbytes: int
    """Bytes of the record."""

    def __post_init__(self) -> None:
        for name in ("momentum", "variance", "nbytes"):
            if getattr(self, name) % 4:
                raise ValueError(f"RecordOffsets.{name}: expected a multiple of 4 bytes, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DeviceChunk:
    """The tensors of a chunk's update in device memory: weights and gradients in one piece, state in a record per tile.

    Raises:
        ValueError: a dtype, shape or device does not fit; the segments are not sorted, disjoint and inside the chunk.
    """

    working: Tensor  # [numel] bfloat16, float16 or float32; decides the state format; overwritten
    records: Tensor  # uint8, the records of all tiles, one after another; overwritten
    grad: Tensor  # [numel] float32, bfloat16 or float16; read only
    tile_numel: int  # elements of each tile but the last
    offsets: RecordOffsets  # in the record of each tile but the last
    last_offsets: RecordOffsets  # in the last tile's
    grad_scale: float  # multiplies every gradient; rounded to float32
    segments: tuple[AdamSegment, ...]  # in the chunk's coordinates

    def __post_init__(self) -> None:
        _check_tensor("DeviceChunk.working", self.working, _FLOAT_DTYPES, self.working)
        _check_tensor("DeviceChunk.grad", self.grad, _FLOAT_DTYPES, self.working)
        _check_segments("DeviceChunk.segments", self.segments, self.working.numel())
        if self.tile_numel <= 0 or self.tile_numel % TILE_MULTIPLE:
            raise ValueError(
                f"DeviceChunk.tile_numel: expected a multiple of {TILE_MULTIPLE} elements, got {self.tile_numel}"
            )
        nbytes = max(self.num_tiles - 1, 0) * self.offsets.nbytes + min(self.num_tiles, 1) * self.last_offsets.nbytes
        if self.records.dtype != torch.uint8 or self.records.numel() != nbytes:
            raise ValueError(
                f"DeviceChunk.records: expected {nbytes} bytes (uint8) for {self.num_tiles} tiles, got "
                f"{self.records.numel()} elements of {self.records.dtype}"
            )
        if self.records.device != self.working.device:
            raise ValueError(
                f"DeviceChunk.records: expected a tensor on {self.working.device}, got one on {self.records.device}"
            )

    @property
    def num_tiles(self) -> int:
        """Number of tiles; an empty chunk has none."""
        return -(-self.working.numel() // self.tile_numel)

    @property
    def state_format(self) -> StateFormat:
        """Format that follows from the working dtype."""
        return state_format_of(self.working.dtype)

    def tiles(self) -> Iterator[DeviceTile]:
        """Yield the tiles in order, each with its part of the segments; those without any are left out."""
        for index in range(self.num_tiles):
            begin = index * self.tile_numel
            end = min(begin + self.tile_numel, self.working.numel())
            segments = clip_segments(self.segments, begin, end)
            if segments:
                yield self._tile(index, begin, end, segments)

    def _tile(self, index: int, begin: int, end: int, segments: tuple[AdamSegment, ...]) -> DeviceTile:
        offsets = self.last_offsets if end == self.working.numel() else self.offsets
        record = self.records[index * self.offsets.nbytes :][: offsets.nbytes]
        length = end - begin
        master_dtype = self.state_format.master_dtype
        return DeviceTile(
            working=self.working[begin:end],
            master=None if master_dtype is None else record[: length * master_dtype.itemsize].view(master_dtype),
            momentum=record[offsets.momentum :][: 4 * length].view(torch.float32),
            variance=record[offsets.variance :][: 4 * length].view(torch.float32),
            grad=self.grad[begin:end],
            grad_scale=self.grad_scale,
            segments=segments,
        )


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


def _check_segments(name: str, segments: tuple[AdamSegment, ...], numel: int) -> None:
    """Raise ValueError unless segments are sorted, disjoint and inside the tile."""
    previous_end = 0
    for segment in segments:
        if not previous_end <= segment.begin <= segment.end <= numel:
            raise ValueError(
                f"{name}: expected sorted, disjoint ranges within [0, {numel}], got "
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
