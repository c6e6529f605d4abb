"""`python -m gemini train FILE`: fine-tune a model with the settings of a training file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from gemini.cli.profiles import cached_profile
from gemini.recipe.run import train
from gemini.recipe.settings_file import read_settings

__all__ = ["add_arguments", "run"]

SERVICE_VARIABLE = "GEMINI_SERVICE"
"""Environment variable with the address of the memory service, for training files that do not name one."""

EPILOG = """\
`python -m gemini init FILE` writes such a file, with every setting explained. Ctrl-C and SIGTERM end the run after the
current step, with a checkpoint. A second signal ends it at once. Checkpoints, log.csv and the trained model are in
output.path.

$GEMINI_SERVICE sets the memory service for files that do not name one; see `python -m gemini serve --help`.

exit code: 0 if trained; 2 if something is wrong with the file, the data or the machine; 130 after Ctrl-C and 143 after
SIGTERM, with a checkpoint for --resume if at least one step was done
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="FILE", help="training file (YAML)")
    parser.add_argument("--resume", action="store_true", help="resume from the last complete checkpoint in output.path")


def run(arguments: argparse.Namespace) -> int:
    """Train, and print where the result is."""
    console = Console(highlight=False)
    settings = read_settings(arguments.file)
    if settings.memory.service is None and SERVICE_VARIABLE in os.environ:
        memory = settings.memory.model_copy(update={"service": os.environ[SERVICE_VARIABLE]})
        settings = settings.model_copy(update={"memory": memory})
    finished = train(settings, resume=arguments.resume, console=console, profile=cached_profile())
    console.print(str(finished.report), markup=False, soft_wrap=True)
    if finished.recording is not None:
        console.print(f"Show what happened in the run: python -m gemini report {finished.recording}", soft_wrap=True)
    if finished.stopped_by is not None:
        console.print(f"{finished.stopped_by.name}: saved {finished.path}; resume with --resume", soft_wrap=True)
        return 128 + finished.stopped_by
    loss = "" if finished.loss is None else f", last loss {finished.loss:.4f}"
    console.print(f"Trained{loss}. The model is in {finished.path}", soft_wrap=True)
    return 0
