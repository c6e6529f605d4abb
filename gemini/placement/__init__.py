"""Where each chunk lives and when it moves: pure decisions on plain data, with no tensor in sight."""

from gemini.placement.check import Budgets, check_plan
from gemini.placement.plan import (
    ChunkDemand,
    ChunkPlacement,
    MemoryDemand,
    PlacementPlan,
    RuntimeShape,
    memory_demand,
)
from gemini.placement.policy import StaticPlacement, auto_placement, choose_plan, static_placement

__all__ = [
    "Budgets",
    "ChunkDemand",
    "ChunkPlacement",
    "MemoryDemand",
    "PlacementPlan",
    "RuntimeShape",
    "StaticPlacement",
    "auto_placement",
    "check_plan",
    "choose_plan",
    "memory_demand",
    "static_placement",
]
