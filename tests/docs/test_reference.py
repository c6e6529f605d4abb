"""The reference has every public name, and the drawings show what the code does."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from gemini.__main__ import COMMANDS
from gemini.chunk.state import ChunkState, check_transition
from gemini.errors import IllegalTransitionError

ROOT = Path(__file__).parents[2]
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
INTEGRATIONS = ("accelerate", "lightning", "transformers")
PUBLIC = (
    "gemini",
    "gemini.nn",
    "gemini.offload",
    "gemini.service",
    "zero",
    *(f"gemini.integrations.{name}" for name in INTEGRATIONS),
)


def public_names(module: str) -> list[str]:
    """Return a module's `__all__` without importing it, which may need other libraries."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError(module)


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name_once(module: str) -> None:
    listed = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
    assert [name for name in public_names(module) if listed.count(f"{module}.{name}") != 1] == []


def test_the_reference_has_every_command() -> None:
    assert sorted(re.findall(r"<!-- help: (\w+) -->", REFERENCE)) == sorted(COMMANDS)


@pytest.fixture(scope="module")
def drawings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drawings", ROOT / "docs" / "site" / "drawings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drawings_are_those_that_the_script_writes(drawings: ModuleType) -> None:
    stale = [
        name
        for name, draw in drawings.DRAWINGS.items()
        if (ROOT / "docs" / "images" / name).read_text(encoding="utf-8") != draw().svg()
    ]
    assert stale == [], "run python docs/site/drawings.py"


def test_the_drawing_of_a_chunks_life_has_the_moves_that_are_allowed(drawings: ModuleType) -> None:
    def is_allowed(current: ChunkState, to: ChunkState) -> bool:
        try:
            check_transition("a chunk", current, to)
        except IllegalTransitionError:
            return False
        return True

    living = [state for state in ChunkState if state is not ChunkState.CLOSED]
    allowed = {(a.value, b.value) for a in living for b in living if is_allowed(a, b)}
    assert set(drawings.CHUNK_MOVES) == allowed


def test_every_chunk_can_be_closed() -> None:
    """The drawing says so in words."""
    for state in set(ChunkState) - {ChunkState.CLOSED}:
        check_transition("a chunk", state, ChunkState.CLOSED)
