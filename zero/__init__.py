"""Many ranks: a model's states, gradients and weights divided among the processes of a torch.distributed group.

This package depends on gemini, which never imports it; it implements gemini.ranks.sharding.
"""

from zero.shard_model import shard

__all__ = ["shard"]
