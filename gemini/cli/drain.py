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
        "--timeout", type=float, metavar="SECONDS", help="evict the jobs that then still run (wait for ever)"
    )
    add_socket_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Order it, and wait until the service ends."""

    def act(client: AdminClient) -> None:
        client.drain(timeout_s=arguments.timeout)
        sys.stdout.write("draining: nothing more is granted; waiting for the jobs to end\n")
        sys.stdout.flush()
        client.wait_until_gone()
        sys.stdout.write("drained: the service has ended\n")

    return run_admin_command(arguments.socket, act)
