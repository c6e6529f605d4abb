"""The inputs of an Adam update: hyper-parameters, their rounded factors, and the tensors of one tile.

Plain data for every kernel, native or Triton; nothing here computes on tensors or knows the native module.
"""

from __future__ import annotations

import enum
import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "AdamHyper",
    "AdamSegment",
    "AdamSource",
    "AdamTile",
    "SegmentFactors",
    "StateFormat",
    "check_tensor",
    "clip_segments",
    "segment_factors",
    "state_format_of",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class StateFormat(enum.Enum):
    """How working weights and master are stored; values are gn_state_format."""

    SPLIT_BF16 = 0
    """bfloat16 working weights and an int16 residual, which together are the float32 master."""
    FP16_MASTER = 1
    """float16 working weights and a float32 master."""
    FP32 = 2
    """float32 working weights, which are also the master."""

    @property
    def master_dtype(self) -> torch.dtype | None:
        """Element type of the master tensor; None if there is none."""
        return _MASTER_DTYPES[self]


_MASTER_DTYPES = {
    StateFormat.SPLIT_BF16: torch.int16,
    StateFormat.FP16_MASTER: torch.float32,
    StateFormat.FP32: None,
}
_FORMATS = {
    torch.bfloat16: StateFormat.SPLIT_BF16,
    torch.float16: StateFormat.FP16_MASTER,
    torch.float32: StateFormat.FP32,
}


def state_format_of(dtype: torch.dtype) -> StateFormat:
    """Return the state format for a working dtype.

    Args:
        dtype: bfloat16, float16 or float32.

    Returns:
        The state format.

    Raises:
        ValueError: the dtype has no state format.
    """
    if dtype not in _FORMATS:
        raise ValueError(f"working dtype: expected bfloat16, float16 or float32, got {dtype}")
    return _FORMATS[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamHyper:
    """Hyper-parameters of one parameter group at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    is_decoupled: bool = True
    """True: AdamW. False: weight decay is added to the gradient, as in Adam with L2 regularisation."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"AdamHyper.{name}: expected a finite number >= 0, got {value!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"AdamHyper.{name}: expected a number in [0, 1), got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFactors:
    """The factors of a kernel, each rounded to float32; names as in gn_adam_segment."""

    beta1_complement: float
    beta2: float
    beta2_complement: float
    neg_step_size: float
    bias2_sqrt: float
    eps: float
    decay: float
    l2: float


@functools.lru_cache(maxsize=1024)
def segment_factors(hyper: AdamHyper, step: int) -> SegmentFactors:
    """Compute the factors of an update in double precision, then round each to float32 once.

    Args:
        hyper: hyper-parameters.
        step: 1-based step count.

    Returns:
        Factors with the bias corrections of this step.

    Raises:
        ValueError: step is below 1.

    Source: Loshchilov & Hutter 2019, Algorithm 2; the same roundings as torch.optim.AdamW.
    """
    if step < 1:
        raise ValueError(f"step: expected a count from 1, got {step}")
    return SegmentFactors(
        beta1_complement=_round_to_float32(1.0 - hyper.beta1),
        beta2=_round_to_float32(hyper.beta2),
        beta2_complement=_round_to_float32(1.0 - hyper.beta2),
        neg_step_size=_round_to_float32(-(hyper.lr / (1.0 - hyper.beta1**step))),
        bias2_sqrt=_round_to_float32(math.sqrt(1.0 - hyper.beta2**step)),
        eps=_round_to_float32(hyper.eps),
        decay=_round_to_float32(1.0 - hyper.lr * hyper.weight_decay) if hyper.is_decoupled else 1.0,
        l2=0.0 if hyper.is_decoupled else _round_to_float32(hyper.weight_decay),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSegment:
    """A run of a tile's elements with the same hyper-parameters and step."""

    begin: int
    """First element, counted from the start of the tile."""
    end: int
    """One past the last element."""
    hyper: AdamHyper
    step: int
    """Step count, from 1."""

    @property
    def factors(self) -> SegmentFactors:
        """The rounded factors of this segment."""
        return segment_factors(self.hyper, self.step)


def clip_segments(segments: Sequence[AdamSegment], begin: int, end: int) -> tuple[AdamSegment, ...]:
    """Return the parts of sorted segments inside [begin, end), relative to `begin`."""
    return tuple(
        AdamSegment(
            begin=max(segment.begin, begin) - begin,
            end=min(segment.end, end) - begin,
            hyper=segment.hyper,
            step=segment.step,
        )
        for segment in segments
        if segment.begin < end and segment.end > begin
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AdamSource:
    """What the tensors of an update are before it, where that is elsewhere; None: they are updated in place."""

    working: Tensor | None = None
    master: Tensor | None = None
    momentum: Tensor | None = None
    variance: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdamTile:
    """The tensors of one update; all 1D [numel], contiguous, on the CPU, not overlapping.

    The tile only refers to the tensors: an update overwrites working, master, momentum and variance. Elements in no
    segment are left untouched, or copied from `source`.

    Raises:
        ValueError: a tensor has the wrong dtype, device, shape or stride, or the segments are not sorted,
            disjoint and within the tile.
    """

    working: Tensor  # [numel] bfloat16, float16 or float32; decides the state format
    master: Tensor | None  # [numel] int16 residual, float32 master, or None; see StateFormat
    momentum: Tensor  # [numel] float32
    variance: Tensor  # [numel] float32
    grad: Tensor  # [numel] float32, bfloat16 or float16; read only
    grad_scale: float  # multiplies every gradient; rounded to float32
    segments: tuple[AdamSegment, ...]
    source: AdamSource | None = None

    def __post_init__(self) -> None:
        numel = self.working.numel()
        check_tensor("AdamTile.working", self.working, FLOAT_DTYPES, numel)
        check_tensor("AdamTile.momentum", self.momentum, (torch.float32,), numel)
        check_tensor("AdamTile.variance", self.variance, (torch.float32,), numel)
        check_tensor("AdamTile.grad", self.grad, FLOAT_DTYPES, numel)
        master_dtype = self.state_format.master_dtype
        if (self.master is None) != (master_dtype is None):
            found = "None" if self.master is None else str(self.master.dtype)
            raise ValueError(
                f"AdamTile.master: expected {master_dtype} for working weights of {self.working.dtype}, got {found}"
            )
        if self.master is not None and master_dtype is not None:
            check_tensor("AdamTile.master", self.master, (master_dtype,), numel)
        _check_segments(self.segments, numel)
        if self.source is not None:
            self._check_source(self.source)

    def _check_source(self, source: AdamSource) -> None:
        for name in ("working", "master", "momentum", "variance"):
            before, target = getattr(source, name), getattr(self, name)
            if before is None:
                continue
            if target is None:
                raise ValueError(f"AdamSource.{name}: expected None, because the tile has no {name}")
            check_tensor(f"AdamSource.{name}", before, (target.dtype,), target.numel())
            if before.data_ptr() == target.data_ptr() and target.numel():
                raise ValueError(f"AdamSource.{name}: expected other memory than AdamTile.{name}; None is in place")

    @property
    def state_format(self) -> StateFormat:
        """Format that follows from the working dtype."""
        return state_format_of(self.working.dtype)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int) -> None:
    """Check that a tensor can be handed to a native kernel by address.

    Args:
        name: name of the tensor in messages.
        tensor: the tensor.
        dtypes: accepted element types; empty accepts all.
        numel: expected number of elements.

    Raises:
        ValueError: it is not a contiguous 1D CPU tensor of this length and one of these types.
    """
    if dtypes and tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous 1D tensor, got shape {list(tensor.shape)} and stride "
            f"{list(tensor.stride())}; pass tensor.view(-1) of contiguous memory"
        )
    if tensor.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements, got {tensor.numel()}")


def _check_segments(segments: tuple[AdamSegment, ...], numel: int) -> None:
    previous_end = 0
    for segment in segments:
        if not previous_end <= segment.begin <= segment.end <= numel:
            raise ValueError(
                f"AdamTile.segments: expected sorted, disjoint ranges within [0, {numel}], got "
                f"[{segment.begin}, {segment.end}) after {previous_end}"
            )
        previous_end = segment.end


def _round_to_float32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
