"""Run what needs a GPU, with its memory capped to that of a consumer card, and keep the results.

Usage: python benchmarks/gpu.py --out benchmarks/results [--cap 10GB] [--swap DIR]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from environment import describe_environment

HERE = Path(__file__).parent


def main() -> None:
    """Measure the kernels, then the example under the cap."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the result files")
    parser.add_argument("--cap", default="10GB", help="device memory the example may take (%(default)s)")
    parser.add_argument("--swap", type=Path, help="directory for the swap file (a temporary one)")
    parser.add_argument("--model", default="gpt2-xl", help="shape of the example (%(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU, and torch sees none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    kernels = arguments.out / f"gpu_adam_{date}.json"
    subprocess.run([sys.executable, HERE / "gpu_adam.py", "--json", kernels], check=True)
    example = arguments.out / f"train_hf_{arguments.model}_{date}.json"
    with tempfile.TemporaryDirectory(dir=arguments.swap) as swap:
        command = [sys.executable, HERE.parent / "examples" / "train_hf.py", "--model", arguments.model]
        command += ["--device", "cuda", "--device-budget", arguments.cap, "--dtype", "bf16", "--nvme", swap]
        command += ["--steps", "8", "--checkpoint-activations", "--json", example]
        subprocess.run(command, check=True)
    document = json.loads(example.read_text()) | {"environment": describe_environment()}
    example.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
