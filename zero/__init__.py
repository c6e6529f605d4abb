"""Many ranks: which slice of a chunk is whose, and how slices become chunks again.

This package depends on gemini and is never imported by it. What exists so far is the seam, `ChunkCollectives`, and its
identity for one process; sharding a model over several ranks will stand behind it.
"""

from zero.collectives import ChunkCollectives, ScalarReduction, SingleProcess

__all__ = ["ChunkCollectives", "ScalarReduction", "SingleProcess"]
