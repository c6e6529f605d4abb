"""`python -m gemini evict JOB`: end a job of a service."""

from __future__ import annotations

import argparse
import sys

from gemini.cli.service_commands import add_socket_argument, run_admin_command
from gemini.service.admin_client import AdminClient

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("job", metavar="JOB", help="name of the job, as `ps` shows it")
    parser.add_argument(
        "--user", type=int, default=-1, metavar="UID", help="user id of the job's owner (default: your own)"
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="time between SIGTERM and SIGKILL (%(default)s)"
    )
    add_socket_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Free the job's kept state, and ask its processes to end."""

    def act(client: AdminClient) -> None:
        client.evict(arguments.job, user=arguments.user, timeout_s=arguments.timeout)
        sys.stdout.write(f"{arguments.job}: freed its kept state and asked its processes to end\n")

    return run_admin_command(arguments.socket, act)
