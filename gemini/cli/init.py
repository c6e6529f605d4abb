"""`python -m gemini init FILE`: write a training file with every setting explained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gemini.errors import ConfigError, naming_file
from gemini.recipe.settings_file import write_template

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="file to write (default: print it)")
    parser.add_argument(
        "--model", default="my-model", metavar="DIR", help="directory of a Hugging Face model (%(default)s)"
    )
    parser.add_argument(
        "--data", nargs="+", default=["data/*.jsonl"], metavar="FILE", help="files with training data (data/*.jsonl)"
    )
    parser.add_argument(
        "--output", default="runs/my-run", metavar="DIR", help="directory for the results of the run (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file; an existing one is left unchanged."""
    known = {
        "model": {"path": arguments.model},
        "data": {"files": arguments.data},
        "output": {"path": arguments.output},
    }
    text = write_template(known)
    if arguments.file is None:
        sys.stdout.write(text)
        return 0
    if arguments.file.exists():
        raise ConfigError(f"{arguments.file} exists; name another file, or remove it first")
    with naming_file("write", arguments.file):
        arguments.file.write_text(text, encoding="utf-8")
    sys.stdout.write(f"Wrote {arguments.file}. Check its settings, then run: python -m gemini train {arguments.file}\n")
    return 0
