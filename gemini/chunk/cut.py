"""What of a chunk lies in the shard that one rank owns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from gemini.chunk.layout import ChunkSpec, ParamPlace
from gemini.model.flat_values import FlatPiece, FlatValues
from gemini.ranks.sharding import ChunkShard

__all__ = ["cut_spec", "cut_values", "piece_of"]


def piece_of(place: ParamPlace, shard: ChunkShard) -> slice:
    """Return which of a parameter's elements lie in a shard; may be empty."""
    begin = min(max(shard.begin - place.begin, 0), place.spec.numel)
    return slice(begin, max(begin, min(shard.end - place.begin, place.spec.numel)))


def cut_spec(spec: ChunkSpec, shard: ChunkShard) -> ChunkSpec:
    """Return the layout of a shard: the pieces of parameters in it, flat, under the parameters' names.

    Args:
        spec: layout of the whole chunk.
        shard: which shard.

    Returns:
        A layout of `shard.numel` elements; parameters of which nothing lies in the shard are left out.
    """
    places = []
    for place in spec.places:
        piece = piece_of(place, shard)
        if piece.start < piece.stop:
            param = dataclasses.replace(place.spec, shape=(piece.stop - piece.start,), split=None)
            places.append(dataclasses.replace(place, spec=param, begin=place.begin + piece.start - shard.begin))
    return dataclasses.replace(spec, places=tuple(places), numel=shard.numel)


def cut_values(spec: ChunkSpec, shard: ChunkShard, values: Iterable[FlatValues]) -> Iterator[FlatValues]:
    """Yield the pieces of parameters' values that lie in a shard, in the order of `cut_spec`.

    Args:
        spec: layout of the whole chunk.
        shard: which shard.
        values: of those parameters, whole, in the layout's order, of which a piece lies in the shard.

    Yields:
        Pieces of the values; of tensors, views.
    """
    pieces = (piece_of(place, shard) for place in spec.places)
    for piece, value in zip((p for p in pieces if p.start < p.stop), values, strict=True):
        yield value[piece] if isinstance(value, torch.Tensor) else FlatPiece(value, piece.start)
