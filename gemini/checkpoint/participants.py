"""The participants of a checkpoint: the engine's ranks, and the user's optimizer, scheduler and modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gemini.checkpoint.manifest import WHOLE, Division
from gemini.chunk.layout import ParamPlace
from gemini.errors import ConfigError
from gemini.model.names import persistent_buffers
from gemini.model.tensor_parallel import local_part
from gemini.runtime.runtime import Runtime

__all__ = [
    "CheckpointedOptimizer",
    "Participants",
    "Stateful",
    "division_of",
    "participants_of",
    "rank_of",
    "world_size_of",
]


class CheckpointedOptimizer(Protocol):
    """The parts of an optimizer that checkpoints use; its moments belong to the engine."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Participants:
    """Objects whose state a checkpoint contains, in addition to the engine's parameters."""

    model: torch.nn.Module
    """The wrapped one, whose modules may keep extra state."""
    buffers: Mapping[str, torch.Tensor]
    """The model's persistent ones."""
    optimizer: CheckpointedOptimizer | None
    scheduler: Stateful | None


def participants_of(
    runtime: Runtime, model: torch.nn.Module, optimizer: CheckpointedOptimizer | None, scheduler: Stateful | None
) -> Participants:
    """Return who takes part.

    Args:
        runtime: the engine's.
        model: the wrapped one.
        optimizer: the one to save or load; None: the engine's own.
        scheduler: as given by the user.

    Returns:
        They, with the model and its persistent buffers.

    Raises:
        ConfigError: the optimizer is not the engine's.
    """
    own: Any = runtime.coming.optimizer
    if optimizer is not None and optimizer is not own:
        raise ConfigError(
            "GeminiDDP: optimizer: expected the HybridAdam that was built last on this engine, got another "
            f"{type(optimizer).__name__}"
        )
    buffers = {name: local_part(buffer) for name, buffer in persistent_buffers(model).items()}
    return Participants(model=model, buffers=buffers, optimizer=own, scheduler=scheduler)


def rank_of(runtime: Runtime) -> int:
    """Return this process's place among the ranks that share the model, from 0."""
    group = runtime.sharding.group
    return list(group.ranks).index(group.rank)


def world_size_of(runtime: Runtime) -> int:
    """Return the number of ranks that share the model."""
    return len(runtime.sharding.group.ranks)


def division_of(place: ParamPlace) -> Division:
    """Return how a parameter is divided among this engine's ranks before it is cut into runs."""
    split = place.spec.split
    if split is None or not place.spec.numel:
        return WHOLE
    return Division(num_parts=split.num_ranks, block_numel=math.prod(place.spec.shape[split.dim :]))
