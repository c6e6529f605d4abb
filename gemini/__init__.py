"""Train models larger than memory: chunks of parameters that move among device, host and NVMe.

Names are loaded from their modules when they are first asked for: what needs no torch, such as the memory service and
its command line, then starts in a blink and stays small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gemini.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CollectiveError,
    ConfigError,
    CorruptRecordError,
    GeminiError,
    HeapUnavailableError,
    IllegalTransitionError,
    MissingCheckpointError,
    MissingLibraryError,
    ModelError,
    OffloadIOError,
    OutOfTierMemoryError,
    RecordingError,
    ServiceError,
    SkippedStepsError,
    TensorError,
    WorkerError,
)

if TYPE_CHECKING:
    from gemini import nn as nn
    from gemini.checkpoint import has_checkpoint
    from gemini.checkpoint.signals import StopOnSignals
    from gemini.chunk.manager import ChunkManager
    from gemini.config import GeminiConfig, NVMeConfig
    from gemini.ddp import GeminiDDP
    from gemini.observe.annotations import annotate
    from gemini.observe.report import MemoryReport
    from gemini.optimizer import HybridAdam
    from gemini.placement.cost_model import StepFlops, transformer_flops
    from gemini.placement.plan import PlacementPlan
    from gemini.placement.policy import StaticPlacement
    from gemini.planning.hardware import HardwareProfile, measure_hardware
    from gemini.pretrained import LoadingReport
    from gemini.pretrained_model import load_pretrained
    from gemini.tiers import MemoryTier

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "ChunkManager",
    "CollectiveError",
    "ConfigError",
    "CorruptRecordError",
    "GeminiConfig",
    "GeminiDDP",
    "GeminiError",
    "HardwareProfile",
    "HeapUnavailableError",
    "HybridAdam",
    "IllegalTransitionError",
    "LoadingReport",
    "MemoryReport",
    "MemoryTier",
    "MissingCheckpointError",
    "MissingLibraryError",
    "ModelError",
    "NVMeConfig",
    "OffloadIOError",
    "OutOfTierMemoryError",
    "PlacementPlan",
    "RecordingError",
    "ServiceError",
    "SkippedStepsError",
    "TensorError",
    "StaticPlacement",
    "StepFlops",
    "StopOnSignals",
    "has_checkpoint",
    "WorkerError",
    "load_pretrained",
    "annotate",
    "measure_hardware",
    "transformer_flops",
]

_NAMES_OF_MODULE = {
    "gemini.observe.annotations": ("annotate",),
    "gemini.checkpoint": ("has_checkpoint",),
    "gemini.chunk.manager": ("ChunkManager",),
    "gemini.config": ("GeminiConfig", "NVMeConfig"),
    "gemini.ddp": ("GeminiDDP",),
    "gemini.planning.hardware": ("HardwareProfile", "measure_hardware"),
    "gemini.optimizer": ("HybridAdam",),
    "gemini.placement.cost_model": ("StepFlops", "transformer_flops"),
    "gemini.placement.plan": ("PlacementPlan",),
    "gemini.placement.policy": ("StaticPlacement",),
    "gemini.pretrained": ("LoadingReport",),
    "gemini.pretrained_model": ("load_pretrained",),
    "gemini.observe.report": ("MemoryReport",),
    "gemini.checkpoint.signals": ("StopOnSignals",),
    "gemini.tiers": ("MemoryTier",),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "nn":
        return importlib.import_module("gemini.nn")
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'gemini' has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULE_OF_NAME[name])
    except AttributeError as error:  # which `from gemini import ...` would take for a missing name, and hide
        raise ImportError(
            f"{_MODULE_OF_NAME[name]} cannot be imported ({error}); if the compiled part was built from older "
            "sources, run python native/build.py"
        ) from error
    found: object = getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
