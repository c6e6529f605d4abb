"""`python -m gemini ps`: what each job holds of a service's memory."""

from __future__ import annotations

import argparse
import pwd
import sys

import msgspec
from rich.console import Console
from rich.table import Table

from gemini.cli.service_commands import add_socket_argument, run_admin_command
from gemini.service.admin_client import AdminClient
from gemini.service.messages import MemberRow, NodeState, TierState
from gemini.tiers import format_nbytes

__all__ = ["add_arguments", "run"]


PIPE_COLUMNS = 160
"""Width in columns of output that is not printed to a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_socket_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the service and show the answer."""

    def act(client: AdminClient) -> None:
        state = client.state()
        if arguments.json:
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(state)).decode() + "\n")
            return
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
        console.print(tier_table(state))
        if state.members:
            console.print(job_table(state.members))
        if state.shared:
            console.print(shared_table(state))
        if state.is_draining:
            console.print("The service is draining: it grants no more memory and ends with its last job.")

    return run_admin_command(arguments.socket, act)


def tier_table(state: NodeState) -> Table:
    """Return how the memory of each tier is used."""
    table = Table(title="Memory")
    for name in ("", "budget", "leased", "kept", "shared", "unused", "free"):
        table.add_column(name, justify="right" if name else "left")
    for name, tier in (("host", state.host), ("disk", state.disk)):
        table.add_row(
            name, *map(format_nbytes, (tier.total, tier.leased, tier.kept, tier.shared, tier.warm)), free(tier)
        )
    return table


def free(tier: TierState) -> str:
    """Return the free bytes of a tier; unused shared chunks count as taken."""
    left = tier.total - tier.leased - tier.kept - tier.shared - tier.warm
    return format_nbytes(left) if left >= 0 else f"-{format_nbytes(-left)}: grants wait"


def job_table(members: list[MemberRow]) -> Table:
    """Return what each rank of each job holds."""
    table = Table(title="Jobs")
    for name in ("job", "user", "rank", "process", "state", "host", "disk", "shared", "priority", "for", "waits for"):
        table.add_column(name, overflow="fold", no_wrap=name not in ("job", "waits for"))
    for row in members:
        table.add_row(
            row.job,
            user_name(row.user),
            f"{row.rank}/{row.num_ranks or '?'}",
            str(row.pid or "-"),
            row.state,
            *map(format_nbytes, (row.host_nbytes, row.disk_nbytes, row.shared_nbytes)),
            str(row.priority),
            format_age(row.age_s),
            row.waits_for,
        )
    return table


def shared_table(state: NodeState) -> Table:
    """Return the shared chunks."""
    table = Table(title="Shared chunks")
    for name in ("key", "user", "bytes", "used by", "state"):
        table.add_column(name, overflow="fold")
    for row in state.shared:
        idle = "" if row.num_users else f", unused for {format_age(row.idle_s)}"
        filled = "filled" if row.is_filled else "being filled"
        table.add_row(row.key, user_name(row.user), format_nbytes(row.nbytes), str(row.num_users), filled + idle)
    return table


def user_name(user: int) -> str:
    """Return a user's name, or the user id if it has no name here."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def format_age(seconds: float) -> str:
    """Format a time span with one or two units."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60} min"
