"""Whether a module is being run again in backward by hooks of its own.

`torch.distributed._composable.checkpoint` checkpoints a module by hooks on it. In forward they run inside ours, so it
saves the weights too; when it runs the module again, ours would run inside of it and take them, and torch counts.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["is_recomputed"]

_COMPOSABLE = "torch.distributed._composable.checkpoint_activation"


def is_recomputed(module: torch.nn.Module) -> bool:
    """Return whether a composable checkpoint of exactly this module runs it again in backward."""
    composable: Any = sys.modules.get(_COMPOSABLE)  # whoever has not imported it does not use it
    state = None if composable is None else composable.checkpoint.state(module)
    return state is not None and not state.enable_hook
