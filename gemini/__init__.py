"""Train models larger than memory: chunks of parameters that move among device, host and NVMe."""

from gemini import nn as nn
from gemini.annotations import annotate
from gemini.checkpoint import has_checkpoint
from gemini.chunk.manager import ChunkManager
from gemini.config import GeminiConfig, NVMeConfig
from gemini.ddp import GeminiDDP
from gemini.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CollectiveError,
    ConfigError,
    CorruptRecordError,
    GeminiError,
    HeapUnavailableError,
    IllegalTransitionError,
    MissingLibraryError,
    ModelError,
    OffloadIOError,
    OutOfTierMemoryError,
    RecordingError,
    WorkerError,
)
from gemini.hardware import HardwareProfile, measure_hardware
from gemini.optimizer import HybridAdam
from gemini.placement.cost_model import StepFlops, transformer_flops
from gemini.placement.plan import PlacementPlan
from gemini.placement.policy import StaticPlacement
from gemini.pretrained import LoadingReport
from gemini.pretrained_model import load_pretrained
from gemini.report import MemoryReport
from gemini.signals import StopOnSignals
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
    "MissingLibraryError",
    "ModelError",
    "NVMeConfig",
    "OffloadIOError",
    "OutOfTierMemoryError",
    "PlacementPlan",
    "RecordingError",
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
