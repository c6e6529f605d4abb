"""`python -m gemini bench`: measure this machine in less than a minute, show the rates and keep them for `plan`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gemini.cli.profiles import cache_path
from gemini.errors import naming_file
from gemini.planning.hardware import HardwareProfile, measure_hardware, save_profile
from gemini.planning.machine import MachineDescription, describe_machine
from gemini.tiers import format_nbytes

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--nvme", type=Path, metavar="DIR", help="directory on the disk to measure (default: measure no disk)"
    )
    parser.add_argument("--device", help='device to measure, "cuda" or "cpu" (default: cuda if there is one)')
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=0.5,
        help="seconds to measure each rate except those of the disk (%(default)s)",
    )
    parser.add_argument(
        "--disk-seconds",
        type=_seconds,
        default=5.0,
        help="seconds to measure each of the three rates of the disk (%(default)s)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="directory in which profiles are kept (~/.cache/gemini-memory)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the profile to this file")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0 seconds, got {text}")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and save."""
    kept = cache_path(describe_machine(), arguments.cache)
    for path in (kept, arguments.json):
        if path is not None:  # before a minute has been spent
            with naming_file("make the directory of", path):
                path.parent.mkdir(parents=True, exist_ok=True)
    with naming_file("find the directory --nvme", Path(arguments.nvme or ".")):
        machine = describe_machine(arguments.nvme)
    profile = measure_hardware(
        arguments.nvme, arguments.device, seconds=arguments.seconds, disk_seconds=arguments.disk_seconds
    )
    for path in (kept, arguments.json):
        if path is not None:
            with naming_file("write", path):
                save_profile(profile, path, machine)
    Console().print(machine_table(machine), rates_table(profile))
    sys.stdout.write(f"Saved the profile to {kept}\n")
    return 0


def machine_table(machine: MachineDescription) -> Table:
    """Return what the machine is made of."""

    def amount(nbytes: int | None) -> str:
        return "none" if nbytes is None else format_nbytes(nbytes)

    table = Table(title="Machine", show_header=False)
    table.add_row("processor", f"{machine.processor}, {machine.num_cpus} logical processors")
    table.add_row("instruction sets", ", ".join(machine.instruction_sets))
    nodes = machine.num_memory_nodes or "an unknown number of"
    table.add_row("memory", f"{amount(machine.memory_nbytes)} on {nodes} nodes")
    table.add_row("device", f"{machine.device or 'none'}, {amount(machine.device_memory_nbytes)}")
    table.add_row("disk", f"{amount(machine.disk_nbytes)}, {amount(machine.disk_free_nbytes)} free")
    return table


def rates_table(profile: HardwareProfile) -> Table:
    """Return what was measured."""
    table = Table(title="Rates")
    table.add_column("operation")
    table.add_column("rate", justify="right")
    for dtype, flops in profile.matrix_rates.items():
        table.add_row(f"matrix products, {dtype}", f"{flops / 1e12:.3g} TFLOP/s")
    names = {
        "device memory, read and written": profile.device_memory_rate,
        "host to device": profile.h2d_rate,
        "device to host": profile.d2h_rate,
        "both at once": profile.both_ways_rate,
        "host memory, read and written": profile.host_memory_rate,
        "disk, read": profile.nvme_read_rate,
        "disk, written": profile.nvme_write_rate,
        "disk, both at once": profile.nvme_mixed_rate,
    }
    for name, rate in names.items():
        table.add_row(name, "not measured" if rate is None else f"{rate / 1e9:.3g} GB/s")
    shares = {
        "matrix products, while the disk is busy": profile.compute_share_beside_nvme,
        "disk, while matrix products run": profile.nvme_share_beside_compute,
    }
    for name, share in shares.items():
        table.add_row(name, "not measured" if share is None else f"{share:.0%}")
    return table
