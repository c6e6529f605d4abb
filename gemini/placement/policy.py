"""Decide the homes of all chunks from sizes and budgets. Deciding never moves anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gemini.placement.auto import auto_placement
from gemini.placement.check import Budgets, check_plan
from gemini.placement.plan import ChunkDemand, PlacementPlan, RuntimeShape
from gemini.placement.static import StaticPlacement, static_placement

__all__ = ["Budgets", "StaticPlacement", "auto_placement", "check_plan", "choose_plan", "static_placement"]


def choose_plan(
    placement: Literal["auto"] | StaticPlacement | PlacementPlan,
    chunks: Sequence[ChunkDemand],
    shape: RuntimeShape,
    budgets: Budgets,
    *,
    prefetch_depth: int,
    chunks_at_once: int = 2,
) -> PlacementPlan:
    """Return the plan that `GeminiConfig.placement` asks for, checked against the budgets.

    Args:
        placement: who decides.
        chunks: the chunks, by id.
        shape: sizes of the buffers.
        budgets: bytes per tier.
        prefetch_depth: chunks to be fetched ahead.
        chunks_at_once: the most chunks without a residence that must be in compute memory at the same time.

    Returns:
        The plan.

    Raises:
        ConfigError: the placement contradicts the tiers there are, or is for other chunks.
        OutOfTierMemoryError: it does not fit.
    """
    if isinstance(placement, PlacementPlan):
        check_plan(chunks, placement, shape, budgets, chunks_at_once=chunks_at_once)
        return placement
    if isinstance(placement, StaticPlacement):
        return static_placement(
            chunks, shape, placement, budgets, prefetch_depth=prefetch_depth, chunks_at_once=chunks_at_once
        )
    return auto_placement(chunks, shape, budgets, prefetch_depth=prefetch_depth, chunks_at_once=chunks_at_once)
