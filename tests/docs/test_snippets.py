"""What the pages for users show runs, and prints what they say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from snippets import REPOSITORY, run_snippet, snippets_of, without_numbers

pytest.importorskip("transformers")

DOCS = REPOSITORY / "docs"
PAGES = [DOCS / "quickstart.md", DOCS / "concepts.md", DOCS / "troubleshooting.md", *(DOCS / "how_to").glob("*.md")]
SLOW = ("several_gpus",)
"""Pages that start processes."""


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # peft's calls
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in SLOW else ()) for page in sorted(PAGES)],
)
def test_the_code_of_a_page_runs_and_prints_what_is_said(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "swap").mkdir()
    snippets = snippets_of(page.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "page"}
    assert snippets

    for snippet in snippets:
        printed = run_snippet(snippet, namespace, str(page))
        if snippet.printed is not None:
            assert without_numbers(printed) == without_numbers(snippet.printed), printed

    namespace.clear()
    assert os.listdir("swap") == [], "an engine of the page was not closed"
    shutil.rmtree(tmp_path)


def test_a_page_that_says_something_else_is_noticed() -> None:
    (snippet,) = snippets_of("```python\nprint('4 chunks')\n```\n\n```text\n5 chunk\n```\n")

    assert snippet.printed == "5 chunk\n"
    assert without_numbers(run_snippet(snippet, {}, "page")) == "# chunks"
    assert without_numbers(snippet.printed) == "# chunk"
