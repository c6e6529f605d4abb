"""Seconds and bytes of a language model's loss, forward and backward: torch's, and `gemini.nn`'s in slices.

Bytes are what tensors made in between take at their peak, the gradients of inputs and weight included: no heap, no
buffers inside operators. They are counted in a run of its own, because counting takes time.

Usage: python benchmarks/loss.py [--rows 1024] [--vocabulary 50257] [--hidden 768] [--repeats 5] [--json PATH]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results_file import spread_of, write_results

from gemini.nn import linear_cross_entropy
from gemini.runtime.memory_probe import MemoryProbe
from gemini.tiers import TierLedger

COLUMNS = ("system", "slice_size", "seconds", "seconds_min", "seconds_max", "peak_bytes", "loss")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="positions (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=50257, help="tokens (%(default)s)")
    parser.add_argument("--hidden", type=int, default=768, help="width of the inputs (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; one more comes first")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def main() -> None:
    """Measure each way in turn, in float32."""
    arguments = parse_arguments()
    torch.manual_seed(0)
    hidden = torch.randn(arguments.rows, arguments.hidden, requires_grad=True)
    weight = (torch.randn(arguments.vocabulary, arguments.hidden) * 0.02).requires_grad_()
    labels = torch.randint(0, arguments.vocabulary, (arguments.rows,))

    def sliced(slicing: Any, slice_size: int, keep_logits: bool = False) -> Callable[[], torch.Tensor]:
        return lambda: linear_cross_entropy(
            hidden, weight, labels, slicing=slicing, slice_size=slice_size, keep_logits=keep_logits
        )

    ways: list[tuple[str, int | None, Callable[[], torch.Tensor]]] = [
        ("torch, whole logits", None, lambda: F.cross_entropy(F.linear(hidden, weight), labels)),
        *(("gemini, slices of the vocabulary", n, sliced("vocabulary", n)) for n in (1024, 4096, 16384)),
        ("gemini, slices of the vocabulary, logits kept", 4096, sliced("vocabulary", 4096, keep_logits=True)),
        *(("gemini, slices of rows", n, sliced("rows", n)) for n in (64, 256)),
    ]
    rows = [
        {"system": system, "slice_size": slice_size, **measure(way, (hidden, weight, labels), arguments.repeats)}
        for system, slice_size, way in ways
    ]
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


def measure(way: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...], num_repeats: int) -> dict[str, Any]:
    """Return seconds of forward and backward, the peak of their tensors' bytes, and the loss."""
    probe = MemoryProbe(torch.device("cpu"), TierLedger({}))
    with probe.trace():
        loss = step(way, inputs)
    seconds = []
    for _ in range(num_repeats):
        start = time.perf_counter()
        step(way, inputs)
        seconds.append(time.perf_counter() - start)
    return {**spread_of(seconds, "seconds"), "peak_bytes": probe.non_model_peak_nbytes, "loss": loss}


def step(way: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> float:
    """Run forward and backward and drop the gradients."""
    for tensor in inputs:
        tensor.grad = None
    loss = way()
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    main()
