"""What MkDocs does not do by itself: links out of docs/, the command line's help, pages without network.

Pages are written to be read in the repository too, where a link may lead to any file. On the site such a file comes
along, as a page if it is Markdown, below `repository/`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
DOCS = Path("docs")
OUTSIDE = Path("repository")
"""Where on the site files of the repository are that are not in docs/."""

HELP_COLUMNS = "88"
SEARCH_SHIM = re.compile(r'"https://unpkg\.com/iframe-worker/shim[^"]*"')

_LINK = re.compile(r"(?<=\]\()([^()\s#]+)(#[^()\s]*)?(?=\))")
_HELP = re.compile(r"<!-- help: (\w+) -->")
_LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="?(?:https?:|//)[^>]*|<link[^>]*stylesheet[^>]*href="?(?:https?:|//)[^>]*'
)


# ---------------------------------------------------------------- links


def site_place(path: Path) -> Path:
    """Return where a file of the repository is on the site."""
    return path.relative_to(DOCS) if path.is_relative_to(DOCS) else OUTSIDE / path


def target_of(link: str, page: Path) -> Path | None:
    """Return the file of the repository that a link on a page means; None if it is none.

    A directory means its README, or that of the nearest directory above that has one.
    """
    target = Path(os.path.normpath(page.parent / link))
    if (ROOT / target).is_dir():
        target = next(each / "README.md" for each in (target, *target.parents) if (ROOT / each / "README.md").is_file())
    return target if (ROOT / target).is_file() else None


def links_of(page: Path) -> Iterator[Path]:
    """Yield the files of the repository that a page links to."""
    for match in _LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        if (target := target_of(match[1], page)) is not None:
            yield target


def relinked(markdown: str, page: Path) -> str:
    """Return a page's text with its links as they must be on the site."""

    def replaced(match: re.Match[str]) -> str:
        target = target_of(match[1], page)
        if target is None:
            return match[0]
        return os.path.relpath(site_place(target), site_place(page).parent) + (match[2] or "")

    return _LINK.sub(replaced, markdown)


def files_outside(pages: list[Path]) -> set[Path]:
    """Return the files outside of docs/ that pages link to, and those that these link to in turn."""
    found: set[Path] = set()
    waiting = list(pages)
    while waiting:
        for target in links_of(waiting.pop()):
            if target not in found and not target.is_relative_to(DOCS):
                found.add(target)
                waiting += [target] if target.suffix == ".md" else []
    return found


# ---------------------------------------------------------------- the command line


def help_of(command: str) -> str:
    """Return what a command's --help prints."""
    from gemini.__main__ import main

    os.environ["COLUMNS"] = HELP_COLUMNS
    with redirect_stdout(io.StringIO()) as output, suppress(SystemExit):
        main([command, "--help"])
    return output.getvalue()


# ---------------------------------------------------------------- what MkDocs calls


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of docs/ that are linked to."""
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    for path in sorted(files_outside(pages)):
        files.append(File.generated(config, str(site_place(path)), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links, and put in help."""
    place = Path(page.file.src_uri)
    source = place.relative_to(OUTSIDE) if place.is_relative_to(OUTSIDE) else DOCS / place
    return _HELP.sub(lambda match: f"```\n{help_of(match[1])}```", relinked(markdown, source))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Let search work in pages opened as files, with a script of our own; refuse what is loaded from elsewhere."""
    root = "../" * page.file.dest_uri.count("/")
    output = SEARCH_SHIM.sub(f'"{root}site/frame_worker.js"', output)
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from another place: {found[0]}")
    return output


def on_post_build(config: Any) -> None:
    """Remove what only a server at a known address has a use for."""
    for name in ("404.html", "sitemap.xml", "sitemap.xml.gz"):
        (Path(config.site_dir) / name).unlink(missing_ok=True)
