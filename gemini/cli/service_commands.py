"""Code that the commands for a running service share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from gemini.service.address import default_socket_path
from gemini.service.admin_client import AdminClient
from gemini.service.channel import NoServiceError

__all__ = ["EXIT_NO_SERVICE", "add_socket_argument", "run_admin_command"]

EXIT_NO_SERVICE = 3


def add_socket_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the option for the service's socket."""
    parser.add_argument(
        "--socket", type=Path, default=default_socket_path(), metavar="PATH", help="socket of the service (%(default)s)"
    )
    parser.epilog = "exit code: 0 if done; 2 if it could not be done; 3 if there is no service at the socket"


def run_admin_command(socket_path: Path, act: Callable[[AdminClient], None]) -> int:
    """Run an action with a service; return the exit code."""
    try:
        with AdminClient(socket_path) as client:
            act(client)
    except NoServiceError as error:
        sys.stderr.write(f"gemini: error: {error}\n")
        return EXIT_NO_SERVICE
    return 0
