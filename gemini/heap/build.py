"""Compiles C++ against the installed torch, once, and keeps the library: the CPU allocator, and devices for tests.

The layout of c10::Allocator, a C++ class, depends on the build of torch, so a binary in a wheel would fit only one
build. The package contains the source instead. The compiled library is kept beside torch's own caches. Its name depends
on the source, the compiler arguments and torch's exact build, so for another torch it is compiled again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from gemini.errors import HeapUnavailableError

__all__ = ["build_allocator", "build_library", "cache_dir"]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("torch_allocator.cpp")
STANDARDS = ("c++17", "c++20")
"""C++ standards to try: torch's headers need the first one, headers of later versions may need the second."""
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 300


def cache_dir() -> Path:
    """Return the directory of compiled allocators, next to torch's hub directory, so TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()).with_name("gemini")


def build_allocator(directory: Path, *, compiler: str | None = None) -> Path:
    """Return the compiled allocator for the running torch; blocks for some seconds the first time.

    Processes may build at the same time: each compiles under its own name and then moves the file into place.

    Args:
        directory: directory of compiled allocators; made if needed.
        compiler: C++ compiler; None: the first one found of c++, g++ and clang++.

    Returns:
        The shared library, for a process that has imported torch.

    Raises:
        HeapUnavailableError: no Linux, no compiler, no headers, a compiler error, or no writable directory.
    """
    return build_library(directory, [SOURCE], compiler=compiler)


def build_library(
    directory: Path,
    sources: Sequence[Path],
    *,
    headers: Sequence[Path] = (),
    libraries: Sequence[str] = ("c10",),
    compiler: str | None = None,
) -> Path:
    """Return a library compiled for the torch that is running; blocks for some seconds the first time.

    Args:
        directory: where compiled libraries are kept; made if needed.
        sources: C++, ASCII; the first one names the library.
        headers: what the sources include of each other.
        libraries: those of torch that it is linked to.
        compiler: C++ compiler; None: the first of c++, g++ and clang++ that is found.

    Returns:
        The shared library, to be loaded into a process that has imported torch.

    Raises:
        HeapUnavailableError: no Linux, no compiler, no headers, a compiler's error, or nowhere to write.
    """
    if not sys.platform.startswith("linux"):
        raise HeapUnavailableError(f"it is written for Linux, this is {sys.platform}")
    torch_dir = Path(torch.__file__).parent
    arguments = _arguments(torch_dir, sources, libraries)
    try:
        library = directory / f"{sources[0].stem}-{_digest(torch_dir, [*sources, *headers], arguments)}.so"
        if not library.exists():
            _build([compiler or _find_compiler(), *arguments], library)
    except OSError as error:
        raise HeapUnavailableError(f"it cannot be compiled: {error}") from error
    return library


def _arguments(torch_dir: Path, sources: Sequence[Path], libraries: Sequence[str]) -> list[str]:
    return [
        *("-O2", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(torch_dir / "include"), *map(str, sources)),
        *(f"-L{torch_dir / 'lib'}", *(f"-l{name}" for name in libraries), "-Wl,--no-undefined"),
    ]


def _digest(torch_dir: Path, texts: Sequence[Path], arguments: list[str]) -> str:
    """Return what changes whenever the library must be compiled again."""
    core = (torch_dir / "lib" / "libc10.so").stat()
    torch_build = (torch.__version__, core.st_size, core.st_mtime_ns)
    parts = ([path.read_text(encoding="ascii") for path in texts], arguments, STANDARDS, torch_build)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _find_compiler() -> str:
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise HeapUnavailableError(f"there is no C++ compiler: none of {', '.join(COMPILERS)} is on PATH")
    return found


def _build(command: list[str], library: Path) -> None:
    logger.info("compiling %s for torch %s into %s, needed once", library.stem, torch.__version__, library.parent)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as build_dir:
        draft = Path(build_dir) / library.name
        _compile([*command, "-o", str(draft)])
        os.replace(draft, library)


def _compile(command: list[str]) -> None:
    """Run the compiler for each C++ standard in turn; raise HeapUnavailableError with its output if all fail."""
    said = ""
    for standard in STANDARDS:
        try:
            ended = subprocess.run([*command, f"-std={standard}"], capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise HeapUnavailableError(f"{command[0]} did not end within {TIMEOUT_S} s") from error
        if ended.returncode == 0:
            return
        said = said or ended.stderr.strip()[-2000:]
    raise HeapUnavailableError(f"{command[0]} failed: {said}")
