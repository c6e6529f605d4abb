"""Links between pages lead somewhere, in the repository as on the site; no MkDocs is needed to know it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "README.md"
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "native/README.md", "benchmarks/README.md")
PAGES = sorted([*(ROOT / name for name in OUTSIDE), *(ROOT / "docs").rglob("*.md")])

_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def text_of(page: Path) -> str:
    """Return a page without its blocks of code."""
    return _CODE.sub("", page.read_text(encoding="utf-8"))


def anchor_of(heading: str) -> str:
    """Return the name that code hosts and the site give a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def links_of(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield file and anchor of each link that leads to no other site."""
    for link in _LINK.findall(text_of(page)):
        if not link.startswith(("http:", "https:", "mailto:")):
            path, _, anchor = link.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    missing = [
        f"{path.name}#{anchor}"
        for path, anchor in links_of(page)
        if not path.is_relative_to(ROOT)
        or not path.exists()
        or (anchor and anchor not in map(anchor_of, _HEADING.findall(text_of(path))))
    ]
    assert missing == []


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = {INDEX}, [INDEX]
    while waiting:
        for path, _ in links_of(waiting.pop()):
            found = path / "README.md" if path.is_dir() else path
            if found in PAGES and found not in reached:
                reached.add(found)
                waiting.append(found)

    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


def test_the_list_of_decisions_has_their_titles() -> None:
    decisions = INDEX.parent / "decisions"
    listed = re.findall(r"^- \[(\d{4})\]\(\1[^)]*\): (.+)$", text_of(decisions / "README.md"), re.MULTILINE)
    titles = [
        re.findall(r"^# (\d{4}): (.+)$", text_of(page), re.MULTILINE)[0]
        for page in sorted(decisions.glob("0*.md"))
        if not page.name.startswith("0000")
    ]
    assert listed == titles


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [("What is saved", "what-is-saved"), ("`.grad` is None", "grad-is-none"), ("torch.compile", "torchcompile")],
)
def test_anchors_are_made_as_code_hosts_do(heading: str, anchor: str) -> None:
    assert anchor_of(heading) == anchor
