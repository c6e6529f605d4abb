"""What an engine adds to each layer of a model: hooks, holds, and parameters that are asked for their functions.

The layers of a Llama too small to compute anything; plain and engine take turns. What the engine's forward and backward
take longer than the plain model's, divided by the layers, is what it costs a layer.

Usage: python benchmarks/hooks.py [--layers 8] [--repeats 30] [--json PATH]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from results_file import spread_of, write_results

from gemini import GeminiConfig, GeminiDDP, HybridAdam, StaticPlacement

COLUMNS = ("system", "part", "us_per_layer", "us_per_layer_min", "us_per_layer_max")
PLACEMENTS: dict[str, dict[str, Any]] = {
    "in memory": {"device": "cpu"},
    "streamed to a simulated device": {
        "device": "simulated",
        "device_budget": "256MiB",
        "placement": StaticPlacement(),
    },
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def build(num_layers: int) -> transformers.LlamaForCausalLM:
    """Return a model of small layers, the same each time."""
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(shape).train()


def timed_step(call: Callable[..., Any], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Return the seconds of a forward and of a backward pass; the step after them is not timed."""
    ids = torch.arange(8).view(1, 8)
    start = time.perf_counter()
    loss = call(input_ids=ids, labels=ids).loss
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    return middle - start, end - middle


def measure(place: str, num_layers: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row each for forward and backward."""
    plain = build(num_layers)
    config = GeminiConfig(dtype=torch.float32, host_budget="1GiB", min_unit_nbytes=0, **PLACEMENTS[place])
    with GeminiDDP(build(num_layers), config) as engine:
        systems = (
            (plain, torch.optim.AdamW(plain.parameters(), 1e-4)),
            (engine, HybridAdam(engine.parameters(), 1e-4)),
        )
        added: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats + 3):
            (plain_forward, plain_backward), (forward, backward) = (timed_step(*system) for system in systems)
            if repeat >= 3:
                added[0].append(1e6 * (forward - plain_forward) / num_layers)
                added[1].append(1e6 * (backward - plain_backward) / num_layers)
    return [
        {"system": place, "part": part, **spread_of(values, "us_per_layer")}
        for part, values in zip(("forward", "backward"), added, strict=True)
    ]


def main() -> None:
    """Measure all placements."""
    options = parse_arguments()
    torch.set_num_threads(1)
    rows = [row for place in PLACEMENTS for row in measure(place, options.layers, options.repeats)]
    settings = {"layers": options.layers, "repeats": options.repeats}
    write_results(options.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
