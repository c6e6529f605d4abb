"""Successive trainers over one model: each continues from what the previous one has trained.

A trainer has no end at which its engine could be closed, so an engine stays on its model until the next trainer begins.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from gemini.ddp import GeminiDDP
from gemini.weights.ownership import runtime_of

__all__ = ["leave", "owns", "take_over"]

_LEFT = "engine_of_trainer"


def owns(engine: GeminiDDP) -> bool:
    """Return whether an engine manages its model still, and was not closed."""
    return any(runtime_of(param) is engine.runtime for param in engine.module.parameters())


def leave(engine: GeminiDDP) -> None:
    """Register an engine that a trainer has built, so that the next trainer may close it."""
    setattr(engine.runtime, _LEFT, weakref.ref(engine))


def take_over(model: torch.nn.Module) -> None:
    """Close the engine that an earlier trainer left on a model; the model then holds its weights again.

    An engine that no trainer built stays.

    Args:
        model: a model, with or without an engine.
    """
    runtime = next((found for found in map(runtime_of, model.parameters()) if found is not None), None)
    reference: Any = getattr(runtime, _LEFT, None)
    engine: GeminiDDP | None = None if reference is None else reference()
    if engine is not None and engine.module is model:
        engine.close()
