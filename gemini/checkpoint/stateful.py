"""What takes part in a checkpoint besides the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from gemini.runtime import Runtime

__all__ = ["CheckpointedOptimizer", "Stateful", "rank_of"]


class CheckpointedOptimizer(Protocol):
    """An optimizer whose moments are the engine's, as far as checkpoints know one."""

    def hyper_state_dict(self) -> dict[str, Any]:
        """Return parameter groups and step counts, by parameter name."""

    def check_hyper_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointMismatchError unless `load_hyper_state_dict` would succeed."""

    def load_hyper_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `hyper_state_dict` returned."""


class Stateful(Protocol):
    """A scheduler, or anything like it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""


def rank_of(runtime: Runtime) -> int:
    """Return this process's number among the ranks that share the model."""
    return 0 if runtime.sharding is None else runtime.sharding.group.rank
