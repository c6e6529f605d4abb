"""Build of the extension module `gemini._native` from the C++ sources beside this file.

setuptools finds `ffibuilder` here (`cffi_modules=["native/build.py:ffibuilder"]`). Run as a script, this file builds
gemini/_native.abi3.so in place, which is all a working copy needs.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from cffi import FFI

__all__ = ["ffibuilder", "make_ffibuilder"]

NATIVE_DIR = Path(__file__).resolve().parent
ROOT_DIR = NATIVE_DIR.parent
HEADER = NATIVE_DIR / "include" / "gemini_native.h"

# Contraction would make the bits depend on the instruction set; errno is never read.
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
]


def read_cdef(header: Path) -> str:
    """Return the plain C between the CDEF markers of the header.

    Args:
        header: path of the public header.

    Returns:
        Declarations that cffi can parse.

    Raises:
        ValueError: a marker is missing.
    """
    text = header.read_text(encoding="ascii")
    begin, end = text.find("/* CDEF-BEGIN */"), text.find("/* CDEF-END */")
    if not 0 <= begin < end:
        raise ValueError(f"{header}: expected the lines /* CDEF-BEGIN */ and /* CDEF-END */ in this order")
    return text[begin:end]


def make_ffibuilder(base_dir: Path | None) -> FFI:
    """Describe the extension to cffi.

    Args:
        base_dir: directory that paths are made relative to, as setuptools demands; None for absolute paths.

    Returns:
        The builder, ready to compile or to hand to setuptools.
    """

    def spell(path: Path) -> str:
        return str(path) if base_dir is None else os.path.relpath(path, base_dir)

    source_dir = NATIVE_DIR / "src"
    builder = FFI()
    builder.cdef(read_cdef(HEADER))
    builder.set_source(
        "gemini._native",
        '#include "gemini_native.h"',
        source_extension=".cpp",
        sources=[spell(path) for path in sorted(source_dir.glob("*.cpp"))],
        depends=[spell(path) for path in [HEADER, *sorted(source_dir.glob("*.h"))]],
        include_dirs=[spell(HEADER.parent)],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
    return builder


ffibuilder = make_ffibuilder(Path.cwd())


def main() -> None:
    """Compile and put the module into the package, unless it is newer than everything it is made of."""
    target = ROOT_DIR / "gemini" / "_native.abi3.so"
    inputs = [Path(__file__), HEADER, *(NATIVE_DIR / "src").iterdir()]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return
    with tempfile.TemporaryDirectory() as build_dir:
        built = make_ffibuilder(None).compile(tmpdir=build_dir, verbose="-v" in sys.argv)
        # Copied beside the target first: a running process keeps the file it has mapped.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copyfile(built, partial)
        os.replace(partial, target)


if __name__ == "__main__":
    main()
