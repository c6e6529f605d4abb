"""`python -m gemini report RUN`: the content of a recording, as a page, a trace, JSON or in the terminal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from gemini.errors import RecordingError, naming_file
from gemini.profile.page import html_page
from gemini.profile.recording import Recording, read_recording
from gemini.profile.report_parts import report_of
from gemini.profile.terminal import terminal_view
from gemini.profile.trace import chrome_trace

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="directory with a recording of engine.record, or the output.path of a run"
    )
    parser.add_argument("--rank", type=int, default=0, help="rank whose recording is shown (%(default)s)")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the page to this file (default: RUN/report.html if no other output is requested)",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the data of the page as JSON")
    parser.add_argument("--terminal", action="store_true", help="show one step in the terminal")
    parser.add_argument("--step", type=int, help="step that --terminal shows (default: the last step with details)")


def run(arguments: argparse.Namespace) -> int:
    """Write and show the requested outputs.

    Args:
        arguments: arguments from `add_arguments`.

    Returns:
        0.

    Raises:
        RecordingError: the recording does not exist or cannot be drawn.
        OffloadIOError: a file cannot be written.
    """
    console = Console(highlight=False)
    recording = read_recording(arguments.run, rank=arguments.rank)
    if not recording.steps:
        raise RecordingError(f"the recording in {arguments.run} has no step: record at least one step")
    files: dict[str, tuple[Path | None, Callable[[Recording], str]]] = {
        "trace": (arguments.trace, lambda recording: json.dumps(chrome_trace(recording))),
        "JSON": (arguments.json, lambda recording: json.dumps(report_of(recording), indent=1, allow_nan=False)),
        "page": (arguments.html, html_page),
    }
    if not arguments.terminal and not any(path for path, _ in files.values()):
        directory = arguments.run if arguments.run.is_dir() else arguments.run.parent
        files["page"] = (directory / "report.html", html_page)
    for name, (path, draw) in files.items():
        if path is not None:
            text = draw(recording)
            with naming_file("write", path):
                path.write_text(text, encoding="utf-8")
            console.print(f"{name}: {path}", soft_wrap=True, markup=False)
    if arguments.terminal:
        console.print(terminal_view(recording, recording.step(arguments.step)))
    return 0
