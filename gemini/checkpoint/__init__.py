"""Training checkpoints: saved from any tier, complete or not there, resumed with the same bits anywhere."""

from gemini.checkpoint.directory import has_checkpoint
from gemini.checkpoint.loading import LoadedCheckpoint
from gemini.checkpoint.saving import CheckpointWriter

__all__ = ["CheckpointWriter", "LoadedCheckpoint", "has_checkpoint"]
