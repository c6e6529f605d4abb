"""Which parameters share a chunk, and where in it each one lies.

Pure data and pure functions: nothing here allocates, and torch appears only as dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from gemini.chunk.units import choose_units, reachable_param_names, root_param_names
from gemini.model.module_tree import ModuleTree
from gemini.model.params import ParamSpec
from gemini.tiers import format_nbytes, round_up

__all__ = [
    "DEFAULT_MAX_SMALL_NBYTES",
    "PLACE_ALIGNMENT_NUMEL",
    "ChunkLayout",
    "ChunkSpec",
    "ParamPlace",
    "UnitSpec",
    "build_layout",
    "layout_summary",
]

DEFAULT_MAX_SMALL_NBYTES = 2**20
"""Modules outside any block up to this size belong to the root unit: hooks and moves would cost more than they save."""

PLACE_ALIGNMENT_NUMEL = 64
"""Every parameter starts at a multiple of this many elements: at least 64 bytes for every working dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamPlace:
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
    places: tuple[ParamPlace, ...]
    numel: int
    """Elements including padding; a multiple of PLACE_ALIGNMENT_NUMEL, not 0 even if no parameter has elements."""

    @property
    def working_nbytes(self) -> int:
        """Bytes of the working weights."""
        return self.numel * self.dtype.itemsize

    @property
    def name(self) -> str:
        """What to call the chunk in messages."""
        first = self.places[0].spec.name if self.places else "empty"
        return f"chunk {self.chunk_id} ({first} and {max(len(self.places) - 1, 0)} more)"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A module whose parameters are fetched and released together."""

    unit_id: int
    module_name: str
    """Fully qualified name of the module; "" is the model itself (the root unit)."""
    own_chunk_ids: tuple[int, ...]
    """Chunks that hold this unit's parameters."""
    chunk_ids: tuple[int, ...]
    """Chunks needed while the module runs: its own, then those of parameters it shares with other units.

    The root's chunks are left out: they are needed during the whole of a step anyway.
    """


@dataclass(frozen=True)
class ChunkLayout:
    """All units and chunks of a model, indexed by their ids."""

    units: tuple[UnitSpec, ...]
    """The root unit is unit 0, even where it owns nothing."""
    chunks: tuple[ChunkSpec, ...]

    @cached_property
    def place_by_name(self) -> dict[str, ParamPlace]:
        """Each parameter's place, by name."""
        return {place.spec.name: place for chunk in self.chunks for place in chunk.places}

    @property
    def root(self) -> UnitSpec:
        """The unit of everything that belongs to no other; needed during the whole of a step."""
        return self.units[0]


def build_layout(tree: ModuleTree, *, max_small_nbytes: int = DEFAULT_MAX_SMALL_NBYTES) -> ChunkLayout:
    """Group a model's parameters into units and pack each unit's into chunks.

    A parameter several units hold belongs to the first of them in module order, and to the root if any module
    outside all units holds it. Units that need no chunk are left out, but for the root.

    Args:
        tree: the model, see `describe_model`.
        max_small_nbytes: modules outside any block up to this size are left to the root unit.

    Returns:
        The layout; a pure function of the arguments, equal for equal units up to names.
    """
    unit_names = choose_units(tree, max_small_nbytes=max_small_nbytes)
    param_names_by_unit = {"": root_param_names(tree, unit_names)}
    param_names_by_unit.update((name, reachable_param_names(tree, name)) for name in unit_names)
    units: list[UnitSpec] = []
    chunks: list[ChunkSpec] = []
    chunk_id_by_param: dict[str, int] = {}
    for module_name, param_names in param_names_by_unit.items():
        own_specs = [tree.spec_by_name[name] for name in param_names if name not in chunk_id_by_param]
        shared_ids = {chunk_id_by_param[name] for name in param_names if name in chunk_id_by_param}
        own_chunks = _pack_unit(own_specs, unit_id=len(units), first_chunk_id=len(chunks))
        chunk_id_by_param.update((place.spec.name, chunk.chunk_id) for chunk in own_chunks for place in chunk.places)
        own_ids = tuple(chunk.chunk_id for chunk in own_chunks)
        borrowed_ids = tuple(sorted(chunk_id for chunk_id in shared_ids if chunks[chunk_id].unit_id != 0))
        if units and not own_ids and not borrowed_ids:
            continue
        units.append(
            UnitSpec(
                unit_id=len(units),
                module_name=module_name,
                own_chunk_ids=own_ids,
                chunk_ids=own_ids + borrowed_ids,
            )
        )
        chunks.extend(own_chunks)
    return ChunkLayout(units=tuple(units), chunks=tuple(chunks))


def _pack_unit(specs: Sequence[ParamSpec], *, unit_id: int, first_chunk_id: int) -> list[ChunkSpec]:
    """Pack parameters into one chunk for each dtype and trainability, both in order of first appearance."""
    groups: dict[tuple[torch.dtype, bool], list[ParamSpec]] = {}
    for spec in specs:
        groups.setdefault((spec.dtype, spec.is_trainable), []).append(spec)
    chunks = []
    for chunk_id, ((dtype, is_trainable), group) in enumerate(groups.items(), start=first_chunk_id):
        places = []
        numel = 0
        for spec in group:
            places.append(ParamPlace(spec=spec, chunk_id=chunk_id, begin=numel))
            numel = round_up(numel + spec.numel, PLACE_ALIGNMENT_NUMEL)
        chunks.append(
            ChunkSpec(
                chunk_id=chunk_id,
                unit_id=unit_id,
                dtype=dtype,
                is_trainable=is_trainable,
                places=tuple(places),
                numel=max(numel, PLACE_ALIGNMENT_NUMEL),  # a home has a tile
            )
        )
    return chunks


def layout_summary(layout: ChunkLayout) -> str:
    """Describe a layout in a few lines for a log: counts, bytes of working weights, the largest units."""
    nbytes_by_unit = [
        sum(layout.chunks[chunk_id].working_nbytes for chunk_id in unit.own_chunk_ids) for unit in layout.units
    ]
    trainable_nbytes = sum(chunk.working_nbytes for chunk in layout.chunks if chunk.is_trainable)
    num_params = len(layout.place_by_name)
    padding_numel = sum(chunk.numel - sum(place.spec.numel for place in chunk.places) for chunk in layout.chunks)
    lines = [
        f"{num_params} parameters in {len(layout.chunks)} chunks of {len(layout.units)} units: "
        f"{format_nbytes(sum(nbytes_by_unit))} of working weights, {format_nbytes(trainable_nbytes)} trainable, "
        f"{padding_numel} elements of padding",
        f"root unit, needed during the whole step: {format_nbytes(nbytes_by_unit[0])}",
    ]
    if len(layout.units) > 1:
        largest = max(layout.units[1:], key=lambda unit: (nbytes_by_unit[unit.unit_id], -unit.unit_id))
        lines.append(f"largest other unit: {largest.module_name}, {format_nbytes(nbytes_by_unit[largest.unit_id])}")
    return "\n".join(lines)
