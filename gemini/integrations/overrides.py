"""Checks that a library still has what a class here overrides; otherwise the override would never be called."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType

from gemini.errors import MissingLibraryError

__all__ = ["check_overrides"]


def check_overrides(ours: type, theirs: type, *, added: Collection[str] = ()) -> None:
    """Check that every method and property of a class overrides one of another class.

    Args:
        ours: the class that overrides.
        theirs: the library's class, of which `ours` is or will be a subclass.
        added: names of methods and properties in `ours` that the library does not know.

    Raises:
        MissingLibraryError: the library has no such method or property: its version is not supported.
    """
    kinds = (FunctionType, property, staticmethod, classmethod)
    names = [name for name, value in vars(ours).items() if isinstance(value, kinds) and name not in added]
    missing = [name for name in names if not hasattr(theirs, name)]
    if missing:
        library = theirs.__module__.partition(".")[0]
        raise MissingLibraryError(
            f"{ours.__module__} needs {theirs.__name__}.{missing[0]}, which {library} {_version_of(library)} does not "
            f"have: install another version of {library}; constraints.txt in the sources names one that works"
        )


def _version_of(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "(of unknown version)"
