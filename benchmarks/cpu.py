"""Run what a machine without a GPU can measure, one script after the other, keep the results and rewrite the tables.

Usage: python benchmarks/cpu.py --out benchmarks/results [--swap DIR] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RUNS = {
    "adam": ["adam.py"],
    "io": ["io.py", "--dir", "SWAP"],
    "step-gpt2-medium": ["step.py", "--model", "gpt2-medium", "--swap", "SWAP"],
    "step-gpt2-large": ["step.py", "--model", "gpt2-large", "--swap", "SWAP"],
    "capacity": ["capacity.py", "--ram", "4GiB", "--swap", "SWAP"],
    "checkpoint": ["checkpoint.py", "--dir", "SWAP"],
    "loss": ["loss.py"],
    "slices": ["slices.py", "--swap", "SWAP"],
    "heap": ["heap.py", "--swap", "SWAP"],
    "zero": ["zero_step.py"],
    "prediction": ["prediction.py", "--swap", "SWAP"],
    "recording": ["recording.py", "--swap", "SWAP"],
    "plan": ["plan.py", "--swap", "SWAP"],
    "commits": ["commits.py", "--overlap", "next-forward"],
    "commits-disk": ["commits.py", "--overlap", "next-forward", "--disk", "SWAP"],
    "service": ["service.py"],
}
"""Script and options of each result file; SWAP stands for a directory on the drive to be measured."""


def main() -> None:
    """Run the scripts; one that fails does not keep the others from running, but ends the run with an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the result files")
    parser.add_argument("--swap", type=Path, help="directory on the drive to be measured (a temporary one)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="what to measure (all)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    failed = []
    with tempfile.TemporaryDirectory(dir=arguments.swap) as swap:
        for name in arguments.only:
            print(f"== {name}", flush=True)
            script, *options = [swap if word == "SWAP" else word for word in RUNS[name]]
            target = arguments.out / f"{name}_cpu_{date}.json"
            done = subprocess.run([sys.executable, HERE / script, *options, "--json", target], check=False)
            if done.returncode:
                failed.append(name)
    subprocess.run([sys.executable, HERE / "tables.py"], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
