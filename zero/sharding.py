"""Assignment of a chunk's shards to ranks. Pure arithmetic.

All shards of a chunk have the same length, because the chunk is padded at its end. A shard's working weights fill whole
blocks of direct I/O, so a shard can be read from disk directly into its place among the others. The last ranks of a
chunk may own only padding.
"""

from __future__ import annotations

from gemini.ranks.sharding import ChunkShard
from gemini.tiers import IO_ALIGNMENT_NBYTES, round_up

__all__ = ["shard_of"]


def shard_of(numel: int, itemsize: int, *, rank: int, world_size: int) -> ChunkShard:
    """Return a rank's shard of a chunk.

    Args:
        numel: number of elements in the chunk.
        itemsize: bytes of one working weight, a power of two up to 4096.
        rank: the rank that owns the shard, from 0.
        world_size: number of ranks that share the chunk, at least 1.

    Returns:
        The shard: ceil(numel / world_size) elements, rounded up to whole blocks of 4096 bytes, at least one.
    """
    block_numel = IO_ALIGNMENT_NBYTES // itemsize
    return ChunkShard(rank=rank, num_ranks=world_size, numel=round_up(max(-(-numel // world_size), 1), block_numel))
