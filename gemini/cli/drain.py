"""`python -m gemini drain`: end a service when its jobs have ended."""

from __future__ import annotations

import argparse
import sys

from gemini.cli.service_commands import add_socket_argument, run_admin_command
from gemini.service.admin_client import AdminClient

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="evict jobs that are still running after this time (default: wait without limit)",
    )
    add_socket_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tell the service to drain, and wait until it ends."""

    def act(client: AdminClient) -> None:
        client.drain(timeout_s=arguments.timeout)
        sys.stdout.write("Draining: the service grants no more memory and waits for its jobs to end\n")
        sys.stdout.flush()
        client.wait_until_gone()
        sys.stdout.write("Drained: the service has ended\n")

    return run_admin_command(arguments.socket, act)
