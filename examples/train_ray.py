"""Train as train_zero.py does, in workers that Ray Train starts and joins to one process group:

    pip install "ray[train]"
    python examples/train_ray.py --workers 2

All workers must run on this machine, because they share one directory for text and swap files.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from lm_training import run_example
from rich.console import Console
from train_zero import add_options, train


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that share the model (%(default)s)")
    add_options(parser, out=Path("runs/ray"))
    return parser.parse_args()


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one worker, whose process group Ray has made; Ray's callbacks get the loss of each step."""
    import ray.train

    train(Console(highlight=False), argparse.Namespace(**settings), lambda loss: ray.train.report({"loss": loss}))


def run(console: Console, arguments: argparse.Namespace) -> None:
    """Start the workers and wait for them."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    arguments.out = arguments.out.resolve()  # workers have directories of their own
    for name in ("nvme", "checkpoint", "record"):
        path = getattr(arguments, name)
        setattr(arguments, name, None if path is None else path.resolve())
    ray.init(num_cpus=max(arguments.workers + 1, os.cpu_count() or 1), include_dashboard=False)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=vars(arguments),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=False),
        run_config=RunConfig(name="zero", storage_path=str(arguments.out / "ray")),
    )
    trainer.fit()
    console.print(f"Trained by {arguments.workers} workers; Ray's own record is in {arguments.out / 'ray'}")


if __name__ == "__main__":
    if importlib.util.find_spec("ray") is None:
        sys.exit('train_ray.py needs Ray Train: pip install "ray[train]", or use train_zero.py')
    arguments = parse_arguments()
    sys.exit(run_example(lambda console: run(console, arguments)))
