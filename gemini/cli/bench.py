"""`python -m gemini bench`: measure this machine, show the rates and keep them."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from gemini.hardware import measure_hardware, save_profile

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--nvme", type=Path, metavar="DIR", help="directory on the disk to measure (no disk)")
    parser.add_argument("--device", help='"cuda" or "cpu" (cuda if there is one)')
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the profile there")


def run(arguments: argparse.Namespace) -> int:
    """Measure, show and save."""
    profile = measure_hardware(arguments.nvme, arguments.device)
    Console().print(profile)
    if arguments.json is not None:
        save_profile(profile, arguments.json)
    return 0
