"""Which shard of a chunk belongs to which rank. Pure arithmetic.

All shards of a chunk are equally long, the chunk being padded at its end; a shard's working weights fill whole blocks
of direct I/O, so that a shard can be read from disk straight into its place among the others. The last ranks of a chunk
may own padding and nothing else.
"""

from __future__ import annotations

from gemini.ranks.sharding import ChunkShard
from gemini.tiers import IO_ALIGNMENT_NBYTES, round_up

__all__ = ["shard_of"]


def shard_of(numel: int, itemsize: int, *, rank: int, world_size: int) -> ChunkShard:
    """Return a rank's shard of a chunk.

    Args:
        numel: elements of the chunk.
        itemsize: bytes of one working weight, a power of two up to 4096.
        rank: whose shard, from 0.
        world_size: ranks that share the chunk, at least 1; any number.

    Returns:
        The shard: ceil(numel / world_size) elements, rounded up to whole blocks of 4096 bytes, at least one.
    """
    block_numel = IO_ALIGNMENT_NBYTES // itemsize
    return ChunkShard(rank=rank, num_ranks=world_size, numel=round_up(max(-(-numel // world_size), 1), block_numel))
