"""The code on a page of the documentation, run in the order of the page.

A block of `python` is executed, in one namespace for the page; one that begins with a comment that is a file's name is
written to that file instead. A block of `sh` is run line by line. A block of `text` right behind either is what it
prints, but for numbers. Blocks of other kinds, and those without one, are for reading.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patience import PATIENCE_S

from gemini.__main__ import main

REPOSITORY = Path(__file__).parents[2]
SWAP = "/nvme/swap"
"""What pages call the directory on the drive."""

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# (\w+\.py)\n")
_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?(e-?\d+)?")
_UNIT = re.compile(r"# ([KMG]i)?B\b")


@dataclass(frozen=True)
class Snippet:
    """A block of a page."""

    kind: str
    text: str
    line: int
    printed: str | None
    """What the page says that it prints; None: nothing is said."""


def snippets_of(markdown: str) -> list[Snippet]:
    """Return the blocks that can be run, in order."""
    found = []
    blocks = list(_BLOCK.finditer(markdown))
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        printed = None
        if after is not None and after[1] == "text" and not markdown[block.end() : after.start()].strip():
            printed = after[2]
        if block[1] in ("python", "sh"):
            found.append(Snippet(block[1], block[2], markdown[: block.start()].count("\n") + 2, printed))
    return found


def without_numbers(text: str) -> str:
    """Return what must be the same on every machine: words, and the places of numbers."""
    return "\n".join(" ".join(_UNIT.sub("# B", _NUMBER.sub("#", line)).split()) for line in text.strip().splitlines())


def run_snippet(snippet: Snippet, namespace: dict[str, Any], page: str) -> str:
    """Run a block in the current directory, where `SWAP` is the directory `swap`, and return what it prints."""
    text = snippet.text.replace(SWAP, "swap")
    if snippet.kind == "sh":
        return "".join(map(_run_command, text.replace("\\\n", " ").splitlines()))
    if name := _FILE_NAME.match(text):
        Path(name[1]).write_text(text, encoding="utf-8")
        return ""
    code = compile("\n" * (snippet.line - 1) + text, page, "exec")
    with redirect_stdout(io.StringIO()) as output:
        exec(code, namespace)
    return output.getvalue()


def _run_command(line: str) -> str:
    program, *arguments = shlex.split(line, comments=True)
    if program == "torchrun":
        return _run_program("-m", "torch.distributed.run", "--standalone", *arguments)
    assert [program, *arguments[:2]] == ["python", "-m", "gemini"], f"do not know how to run {line}"
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(output):
        main(arguments[2:])
    return output.getvalue()


def _run_program(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
