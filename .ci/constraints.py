#!/usr/bin/env python3
"""Write constraints.txt: the version of each package that this environment has, for `make setup` to install again.

`make constraints` runs it with .venv's Python after the suite was green there. Each line holds for the Pythons that the
package itself admits. Left out is what is chosen elsewhere: the package of this project, pip, and what belongs to one
build of torch, such as triton and CUDA's libraries.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "gemini-memory"
EXTRAS = ("dev",)
MINORS = range(10, 14)
"""The Pythons 3.x that pyproject.toml admits."""
LAST_PATCH = 99
"""A patch level that no Python has reached."""
BUILD_TOOLS = ("setuptools", "wheel")
LEFT_OUT = re.compile(r"pip|triton|(nvidia|cuda)-.*|gemini-memory")
HEAD = """\
# The versions with which all tests were last green, on Python {python}.
# `make setup`, `make test` and continuous integration install these; `make test-newest` does not.
# Written by `make constraints`, not by hand. A torch that is already installed is kept whatever is said here, and what
# it needs is then left to it. Packages that only another Python needs (such as exceptiongroup on 3.10) are not listed,
# nor is what belongs to one build of torch (triton, CUDA's libraries).
"""


def main() -> None:
    lines = sorted(filter(None, (line_of(name) for name in needed())), key=str.lower)
    head = HEAD.format(python=".".join(map(str, sys.version_info[:2])))
    (ROOT / "constraints.txt").write_text(head + "\n".join(lines) + "\n", encoding="ascii")
    print(f"constraints.txt: {len(lines)} packages")


def needed() -> set[str]:
    """Return the packages that the project needs here, those that these need included."""
    found: set[str] = set()
    waiting = [(canonicalize_name(PROJECT), frozenset(EXTRAS)), *((name, frozenset()) for name in BUILD_TOOLS)]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # needed elsewhere, or optional
        found.add(name)
        for requirement in map(Requirement, requires):
            environments = [{"extra": extra} for extra in ("", *extras)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                entry = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if entry not in seen:
                    seen.add(entry)
                    waiting.append(entry)
    return found


def line_of(name: str) -> str | None:
    """Return a package's line; None if it is left out."""
    if LEFT_OUT.fullmatch(name):
        return None
    found = distribution(name)
    version = Version(found.version)
    marker = marker_of(found.metadata.get("Requires-Python"))
    return f"{found.metadata['Name']}=={version.public}{marker}"


def marker_of(requires_python: str | None) -> str:
    """Return the marker of the Pythons that a version admits; nothing if these are all that the project admits."""
    specifiers = SpecifierSet(requires_python or "")
    admitted = [minor for minor in MINORS if f"3.{minor}.{LAST_PATCH}" in specifiers]
    if not admitted:
        return ""
    first, last = admitted[0], admitted[-1]
    bounds = []
    patch = next(patch for patch in range(LAST_PATCH + 1) if f"3.{first}.{patch}" in specifiers)
    if patch:  # such as >=3.11.5: Debian 12 has 3.11.2
        bounds.append(f'python_full_version >= "3.{first}.{patch}"')
    elif first > MINORS[0]:
        bounds.append(f'python_version >= "3.{first}"')
    if last < MINORS[-1]:
        bounds.append(f'python_version <= "3.{last}"')
    return f"; {' and '.join(bounds)}" if bounds else ""


if __name__ == "__main__":
    main()
