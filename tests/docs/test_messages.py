"""The messages that docs/troubleshooting.md quotes are those that are in the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [*ROOT.glob("gemini/**/*.py"), *ROOT.glob("zero/*.py"), ROOT / ".ci" / "bootstrap.py"]
VALUE = "\0"
"""Where a literal has a value: {} in an f-string, %s in a message that is logged."""


def quoted_messages() -> list[str]:
    return re.findall(r"^> `(.*)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def literals() -> Iterator[str]:
    """Yield each string of the sources, with a mark in place of each value."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sd]", VALUE, node.value)


@pytest.fixture(scope="module")
def source_text() -> str:
    return "\n".join(literals())


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_in_the_sources(message: str, source_text: str) -> None:
    parts = [re.escape(part) for part in re.split(r"\.\.\.", message)]
    # A directory's name step-... is literal; elsewhere three points stand for values and what is between them.
    pattern = r"(?:\.\.\.|[^\n]*?)".join(parts)

    assert re.search(pattern, source_text), message


def test_quotes_are_found_and_inventions_are_not(source_text: str) -> None:
    assert len(quoted_messages()) > 40
    assert "the cat sat on chunk" not in source_text
