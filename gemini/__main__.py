"""The command line: `python -m gemini COMMAND`, installed as `gemini-memory`.

Finds the command's module and turns errors into one line; must not know what any command does.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from gemini.errors import GeminiError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "init": ("gemini.cli.init", "write a training file with every setting explained"),
    "train": ("gemini.cli.train", "fine-tune a model with the settings of a training file"),
    "bench": ("gemini.cli.bench", "measure this machine"),
    "report": ("gemini.cli.report", "show the recording of a run"),
    "plan": ("gemini.cli.plan", "predict the memory and time that training a model takes, without allocating it"),
    "serve": ("gemini.cli.serve", "run the memory service, which shares this machine's memory among jobs"),
    "ps": ("gemini.cli.ps", "show the memory that each job of a service holds"),
    "evict": ("gemini.cli.evict", "end a job of a memory service"),
    "drain": ("gemini.cli.drain", "end a memory service when its jobs have ended"),
}
"""Module and summary of each command. A module has `add_arguments(parser)`, and `run(arguments)`, an exit code."""

EXTRAS = {"train": "train", "serve": "service", "ps": "service", "evict": "service", "drain": "service"}
"""Extra that installs what a command imports; a command that is missing here names the package itself."""

EXIT_USAGE = 2
"""Same exit code as argparse's."""
EXIT_INTERRUPTED = 130
"""Exit code of a shell for a program that Ctrl-C has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command's name and its arguments; None: those of the process.

    Returns:
        The exit code: the command's own, 2 with a line on standard error if it could not be carried out, or 130 after
        Ctrl-C.

    Raises:
        SystemExit: the arguments are wrong, or help was asked for.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m gemini", description="Plan and measure training within memory budgets.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        for name, (module_name, summary) in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
            if argv[:1] == [name]:  # the others' modules are not imported
                command = importlib.import_module(module_name)
                command.add_arguments(subparser)
        arguments = parser.parse_args(argv)
        return _run(command, arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "gemini"):
            raise
        extra = EXTRAS.get(argv[0])
        wanted = package if extra is None else f"'gemini-memory[{extra}]'"
        return _fail(f"this command needs the package {package}, which is not installed; pip install {wanted}")
    except (GeminiError, OSError) as error:
        return _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.stderr.write("gemini: interrupted\n")
        return EXIT_INTERRUPTED


def _run(command: ModuleType, arguments: argparse.Namespace) -> int:
    code: int = command.run(arguments)
    return code


def _fail(message: str) -> int:
    sys.stderr.write(f"gemini: error: {message}\n")
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
