"""Chunks for tests, laid out as the product lays them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemini.chunk.layout import PLACE_ALIGNMENT_NUMEL, ChunkSpec, ParamPlace
from gemini.model.params import ParamSpec
from gemini.tiers import round_up

__all__ = ["make_chunk_spec"]


def make_chunk_spec(
    lengths: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    chunk_id: int = 0,
    name: str = "weight{}",
    is_trainable: bool = True,
    is_padded: bool = True,
) -> ChunkSpec:
    """Return a chunk of 1D parameters, one behind the other.

    Args:
        lengths: elements of each parameter.
        dtype: of all of them.
        chunk_id: the chunk's number.
        name: of each parameter, with a place for its number.
        is_trainable: whether they have gradients.
        is_padded: whether each begins at a multiple of the alignment, and the chunk ends at one.
    """
    alignment = PLACE_ALIGNMENT_NUMEL if is_padded else 1
    places, begin = [], 0
    for i, length in enumerate(lengths):
        spec = ParamSpec(name=name.format(i), index=i, shape=(length,), dtype=dtype, is_trainable=is_trainable)
        places.append(ParamPlace(spec=spec, chunk_id=chunk_id, begin=begin))
        begin = round_up(begin + length, alignment)
    return ChunkSpec(
        chunk_id=chunk_id, unit_id=0, dtype=dtype, is_trainable=is_trainable, places=tuple(places), numel=begin
    )
