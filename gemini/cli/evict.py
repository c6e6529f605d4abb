"""`python -m gemini evict JOB`: end a job of a service."""

from __future__ import annotations

import argparse
import sys

from gemini.cli.service_commands import add_socket_argument, visit
from gemini.service.visitor import Visitor

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("job", metavar="JOB", help="as ps shows it")
    parser.add_argument("--user", type=int, default=-1, metavar="UID", help="whose (your own)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="from SIGTERM to SIGKILL (%(default)s)"
    )
    add_socket_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Free the job's kept state, and ask its processes to end."""

    def act(visitor: Visitor) -> None:
        visitor.evict(arguments.job, user=arguments.user, timeout_s=arguments.timeout)
        sys.stdout.write(f"{arguments.job}: what was kept is freed, and its processes are asked to end\n")

    return visit(arguments.socket, act)
