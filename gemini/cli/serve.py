"""`python -m gemini serve`: run the memory service of this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import grp
import logging
import logging.handlers
import queue
import resource
import shutil
import sys
from pathlib import Path

import psutil

from gemini.errors import ConfigError
from gemini.service.address import default_socket_path
from gemini.service.fairness import Amount
from gemini.service.node_service import NodeService, ServiceOptions
from gemini.tiers import format_nbytes, parse_nbytes

__all__ = ["add_arguments", "run"]

logger = logging.getLogger(__name__)

MAX_LOG_RECORDS = 1000
"""Maximum number of log records that wait to be written."""

EPILOG = """\
Jobs use the service with GeminiConfig(service="unix:PATH"). After SIGTERM, the service accepts no new job, waits for
--drain-timeout and ends. Jobs that still run continue without it and find the next service. docs/service.md describes
the guarantees.

exit code: 0 if it ended as requested; 2 if it could not begin
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--host-budget", required=True, metavar="BYTES", help='host memory to grant, such as "96GiB"')
    parser.add_argument(
        "--nvme", metavar="DIR:BYTES", help="directory for swap files, and disk space to grant there (default: no disk)"
    )
    parser.add_argument(
        "--socket", type=Path, default=default_socket_path(), metavar="PATH", help="socket to listen on (%(default)s)"
    )
    parser.add_argument(
        "--mode", type=lambda text: int(text, 8), default=0o600, metavar="OCTAL", help="permissions of the socket (600)"
    )
    parser.add_argument("--group", metavar="NAME", help="group of the socket; use with --mode 660 to admit its members")
    for name, default, text in (
        ("--grace", 600.0, "time for which the state of a dead job is kept (%(default)s)"),
        ("--warm", 600.0, "time for which unused shared chunks are kept (%(default)s)"),
        ("--drain-timeout", 10.0, "time for which the service waits for jobs after SIGTERM (%(default)s)"),
    ):
        parser.add_argument(name, type=float, default=default, metavar="SECONDS", help=text)
    parser.add_argument(
        "--http", metavar="HOST:PORT", help="serve metrics and a page at this address, to anyone who can reach it"
    )
    parser.add_argument("--endurance", metavar="BYTES", help='rated endurance of the drive, such as "600TB"')
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to end."""
    written = logging.StreamHandler(sys.stderr)
    written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_LOG_RECORDS)
    listener = logging.handlers.QueueListener(records, written)
    service_logger = logging.getLogger("gemini")
    service_logger.addHandler(_DroppingHandler(records))
    service_logger.setLevel(logging.INFO)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # three descriptors per client, one per chunk
    listener.start()
    try:
        asyncio.run(_serve(arguments))
    finally:
        listener.stop()
    return 0


class _DroppingHandler(logging.handlers.QueueHandler):
    """Passes records to the thread that writes them, so that the service does not wait if nothing reads its output."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


async def _serve(arguments: argparse.Namespace) -> None:
    options = options_of(arguments)
    warn_of_excess(options)
    service = NodeService(options)
    if arguments.http is None:
        return await service.run()
    from gemini.service.http import HttpServer  # aiohttp takes memory that only this option needs

    endurance = parse_nbytes(arguments.endurance, name="--endurance") if arguments.endurance is not None else None
    async with HttpServer(service, arguments.http, endurance_nbytes=endurance):
        await service.run()


def warn_of_excess(options: ServiceOptions) -> None:
    """Warn if the budgets exceed what the machine has."""
    granted = [("--host-budget", options.budget.host, psutil.virtual_memory().total, "memory in this machine")]
    if options.disk_directory is not None and options.disk_directory.is_dir():
        total = shutil.disk_usage(options.disk_directory).total
        granted.append(("--nvme", options.budget.disk, total, "on that drive"))
    for option, nbytes, total, where in granted:
        if nbytes > total:
            logger.warning("%s: %s is more than the %s %s", option, format_nbytes(nbytes), format_nbytes(total), where)


def options_of(arguments: argparse.Namespace) -> ServiceOptions:
    """Return the options that the command line gives.

    Args:
        arguments: arguments from `add_arguments`.

    Returns:
        The options.

    Raises:
        ConfigError: an argument is malformed.
    """
    directory, disk_nbytes = None, 0
    if arguments.nvme is not None:
        name, _, amount = arguments.nvme.rpartition(":")
        if not name:
            raise ConfigError(f'--nvme: expected a directory and bytes such as "/nvme:500GiB", got {arguments.nvme!r}')
        directory, disk_nbytes = Path(name), parse_nbytes(amount, name="--nvme")
    return ServiceOptions(
        socket_path=arguments.socket,
        budget=Amount(parse_nbytes(arguments.host_budget, name="--host-budget"), disk_nbytes),
        disk_directory=directory,
        socket_mode=arguments.mode,
        socket_group=None if arguments.group is None else group_id(arguments.group),
        grace_s=arguments.grace,
        warm_s=arguments.warm,
        drain_timeout_s=arguments.drain_timeout,
    )


def group_id(name: str) -> int:
    """Return a group's number.

    Args:
        name: name of the group.

    Returns:
        The group's id.

    Raises:
        ConfigError: the group does not exist.
    """
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ConfigError(f"--group: this machine has no group {name!r}") from error
