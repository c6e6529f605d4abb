"""What moves: parameters packed into chunks, their states, and the memory they take turns in."""

from gemini.chunk.layout import ChunkLayout, ChunkSpec, ParamPlace, UnitSpec, build_layout
from gemini.model.module_tree import describe_model
from gemini.model.params import ParamSpec

__all__ = ["ChunkLayout", "ChunkSpec", "ParamPlace", "ParamSpec", "UnitSpec", "build_layout", "describe_model"]
