"""Run what a machine without a GPU can measure, one script after the other, and keep the results.

Usage: python benchmarks/cpu.py --out benchmarks/results [--swap DIR]
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    """Run the scripts; a failing one ends the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the result files")
    parser.add_argument("--swap", type=Path, help="directory on the drive to be measured (a temporary one)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory(dir=arguments.swap) as swap:
        for name, options in (
            ("adam", []),
            ("disk", ["--dir", swap]),
            ("step", ["--swap", swap]),
        ):
            print(f"== {name}", flush=True)
            target = arguments.out / f"{name}_cpu_{date}.json"
            subprocess.run([sys.executable, HERE / f"{name}.py", *options, "--json", target], check=True)


if __name__ == "__main__":
    main()
