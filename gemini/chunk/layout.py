"""Which parameters share a chunk, and where in it each one lies.

Pure data and pure functions: nothing here allocates, and torch appears only as dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["SLOT_ALIGNMENT_NUMEL", "ChunkLayout", "ChunkSpec", "ParamSlot", "ParamSpec", "UnitSpec"]

SLOT_ALIGNMENT_NUMEL = 64
"""Every parameter starts at a multiple of this many elements: at least 64 bytes for every working dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """What packing needs to know of one parameter."""

    name: str
    """Fully qualified name: the first one `named_parameters` meets."""
    index: int
    """Position in the model's parameter order."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Dtype of the working weight."""
    is_trainable: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for extent in self.shape:
            numel *= extent
        return numel


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSlot:
    """A parameter's place in a chunk."""

    spec: ParamSpec
    chunk_id: int
    begin: int
    """First element in the chunk."""

    @property
    def end(self) -> int:
        """One past the last element in the chunk."""
        return self.begin + self.spec.numel


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSpec:
    """One contiguous buffer: parameters of one unit, one dtype, all trainable or all frozen."""

    chunk_id: int
    unit_id: int
    dtype: torch.dtype
    is_trainable: bool
    slots: tuple[ParamSlot, ...]
    numel: int
    """Elements including padding; a multiple of SLOT_ALIGNMENT_NUMEL."""

    @property
    def working_nbytes(self) -> int:
        """Bytes of the working weights."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A module whose parameters are fetched and released together."""

    unit_id: int
    module_name: str
    """Fully qualified name of the module; "" is the model itself (the root unit)."""
    own_chunk_ids: tuple[int, ...]
    """Chunks that hold this unit's parameters."""
    chunk_ids: tuple[int, ...]
    """Chunks needed while the module runs: its own, then those of parameters it shares with other units."""


@dataclass(frozen=True)
class ChunkLayout:
    """All units and chunks of a model, indexed by their ids."""

    units: tuple[UnitSpec, ...]
    """The root unit is unit 0, even where it owns nothing."""
    chunks: tuple[ChunkSpec, ...]

    @cached_property
    def slot_by_name(self) -> dict[str, ParamSlot]:
        """Each parameter's place, by name."""
        return {slot.spec.name: slot for chunk in self.chunks for slot in chunk.slots}

    @property
    def root(self) -> UnitSpec:
        """The unit of everything that belongs to no other; needed during the whole of a step."""
        return self.units[0]
