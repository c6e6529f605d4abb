"""Many ranks: a model's states, gradients and weights shared out among the processes of a torch.distributed group.

This package depends on gemini and is never imported by it; gemini.ranks.sharding is where it plugs in.
"""

from zero.shard_model import shard

__all__ = ["shard"]
