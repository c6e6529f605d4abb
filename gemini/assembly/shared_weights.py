"""Frozen weights that several jobs of a machine read from one copy.

[Note: Frozen weights of several jobs]
A frozen chunk whose tiles are all in host memory is requested by a key. The key is made from the source of the values:
the files of a checkpoint (name, length and time) and the names of the tensors in them, or the values in the model. The
first process to ask writes the chunk into a memory file, reports the SHA-256 of its bytes, and seals it. All others map
it and read no files. The mapping is copy-on-write, so a page that a program writes to becomes that process's own.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gemini.assembly.blueprint import Blueprint
from gemini.assembly.first_values import WeightSource
from gemini.chunk.layout import ChunkSpec
from gemini.model.names import named_params
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["SharedPart", "SharedWeights", "fill_shared", "find_shared_parts", "shared_key"]

MAX_PARTS = 1024
"""Chunks that the service takes from one lease."""
HASHED_NBYTES = 16 << 20
"""Bytes of a chunk that are hashed at a time; other threads run meanwhile."""


class SharedPart(NamedTuple):
    """A chunk of frozen weights, in the terms of the service."""

    key: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """A chunk of frozen weights from the service, as a source of memory."""

    read: Callable[[SharedPart, Callable[[torch.Tensor], None]], torch.Tensor]
    """Returns a chunk that the service has, written by what is given if nobody has yet; see NodeMemory.shared."""
    part: SharedPart
    fill: Callable[[torch.Tensor], None]
    """Writes it, if nobody has yet."""
    is_lockable: bool = False

    def take(self, nbytes: int) -> torch.Tensor:
        """Return the weights, uint8 [nbytes]."""
        assert nbytes == self.part.nbytes
        return self.read(self.part, self.fill)


def find_shared_parts(
    blueprint: Blueprint, model: torch.nn.Module, weights: WeightSource | None
) -> dict[int, SharedPart]:
    """Return which chunks of an engine other jobs may have too, by chunk id.

    Args:
        blueprint: of the engine; where several ranks share a model, they share frozen weights among themselves.
        model: whose values count where `weights` has none.
        weights: as for `shared_key`.

    Returns:
        The frozen chunks that live in host memory, whole, and whose values are known before they are made.
    """
    params = dict(named_params(model))
    parts = {}
    for chunk, shard, homes in zip(blueprint.layout.chunks, blueprint.shards, blueprint.plan.chunks, strict=True):
        if chunk.is_trainable or shard is not None or set(homes.working) != {MemoryTier.HOST}:
            continue
        nbytes = round_up(chunk.working_nbytes, IO_ALIGNMENT_NBYTES)
        key = shared_key(chunk, nbytes=nbytes, params=params, weights=weights)
        if key is not None:
            parts[chunk.chunk_id] = SharedPart(key, nbytes)
    largest = sorted(parts, key=lambda chunk_id: parts[chunk_id].nbytes, reverse=True)[:MAX_PARTS]
    return {chunk_id: parts[chunk_id] for chunk_id in sorted(largest)}


def fill_shared(descriptor: int, nbytes: int, fill: Callable[[torch.Tensor], None]) -> str:
    """Have a memory file written; return the digest of its content. The file is unmapped again on return."""
    os.posix_fallocate(descriptor, 0, nbytes)  # a shortage is an error here, and a signal in the first write
    with mmap.mmap(descriptor, nbytes) as mapping:
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        fill(memory)
        del memory
        digest = hashlib.sha256()
        with memoryview(mapping) as content:
            for begin in range(0, nbytes, HASHED_NBYTES):
                with content[begin : begin + HASHED_NBYTES] as part:
                    digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def shared_key(
    chunk: ChunkSpec,
    *,
    nbytes: int,
    params: Mapping[str, torch.Tensor],
    weights: WeightSource | None,
) -> str | None:
    """Return the key of a frozen chunk, the same for all jobs in which it will have the same bytes.

    Args:
        chunk: its layout.
        nbytes: length of its home.
        params: the model's parameters, by canonical name; on the meta device if they have no values.
        weights: values that go before those; None: there are none.

    Returns:
        The key; None if it is not known before the values are made.
    """
    key = hashlib.sha256(repr((1, str(chunk.dtype), nbytes)).encode())
    for place in chunk.places:
        identity = None if weights is None else weights.identity_of(place.spec.name)
        if identity is None:
            param = params[place.spec.name]
            if param.is_meta or place.spec.split is not None:
                return None
            identity = _digest_of(param.detach())
        key.update(repr((place.begin, place.spec.shape, identity)).encode())
    return f"frozen:{key.hexdigest()[:32]}"


def _digest_of(values: torch.Tensor) -> str:
    flat = values.cpu().contiguous().view(-1).view(torch.uint8)
    return f"{values.dtype}:{hashlib.sha256(flat.numpy().data).hexdigest()}"
