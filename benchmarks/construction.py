"""Seconds that an engine takes to be built: memory claimed and touched, first weights brought home.

A model of transformers' Llama shape in bfloat16, its weights and state in host memory, in a process of its own each
time. `weights` says where first values come from:

    given       the model has them already
    own         the model is on the meta device; its own initialisation draws random numbers
    repeated    the model is on the meta device; one block of numbers is repeated, as gpu.py does

With --against another checkout of the project, whose native module is built, takes turns with this one. The processors'
seconds are of the whole process: on a busy machine they are the steadier figure.

Usage: python benchmarks/construction.py [--layers 8] [--rounds 3] [--against DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from children import ROOT, run_child
from results_file import missing_row, spread_of, write_results

WEIGHTS = ("given", "own", "repeated")
COLUMNS = ("system", "weights", "params", "s", "s_min", "s_max", "s_per_1e9", "cpu_s_per_1e9", "peak_rss_bytes")
LONGEST_S = 600.0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of 50 M parameters each (%(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="width; fewer for a trial (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "simulated", "cuda"), default="simulated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--against", type=Path, help="another checkout, which takes turns with this one")
    parser.add_argument("--child", choices=WEIGHTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args()


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Build one engine in this process and return what it took."""
    import torch
    from gpu_systems import SHAPES, build_model, random_init
    from resident_memory import peak_resident_nbytes

    from gemini import GeminiConfig, GeminiDDP

    width = options.hidden
    SHAPES["measured"] = {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(width // 128, 1),
    }
    is_given = options.child == "given"
    dtype = torch.bfloat16 if is_given else torch.float32
    model = build_model("measured", device="cpu" if is_given else "meta", dtype=dtype, checkpoints=False)
    budget = {} if options.device == "cpu" else {"device_budget": "4GiB"}
    config = GeminiConfig(
        dtype=torch.bfloat16, device=options.device, tile_numel=1 << 22, gradient_accumulation=False, **budget
    )
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    engine = GeminiDDP(model, config, init_fn=random_init(model) if options.child == "repeated" else None)
    end_s, end_cpu_s = time.perf_counter(), time.process_time()
    num_params = engine.memory_report().num_params
    engine.close()
    return {
        "params": num_params,
        "s": end_s - begin_s,
        "cpu_s": end_cpu_s - begin_cpu_s,
        "peak_rss_bytes": peak_resident_nbytes(),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each checkout and source of weights."""
    roots = {"gemini": ROOT} if options.against is None else {"gemini": ROOT, "gemini before": options.against}
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {}
    failed: dict[tuple[str, str], str] = {}
    for _ in range(options.rounds):
        for weights in options.weights:
            for system, root in roots.items():
                command = [sys.executable, __file__, "--child", weights, "--device", options.device]
                command += ["--layers", str(options.layers), "--hidden", str(options.hidden)]
                try:
                    result = run_child(command, LONGEST_S, root=root)
                except RuntimeError as error:
                    failed[system, weights] = str(error)
                    continue
                taken.setdefault((system, weights), []).append(result)
                print(f"{system}, {weights}: {result['s']:.1f} s", flush=True)
    rows = [missing_row(system, why, weights=weights) for (system, weights), why in failed.items()]
    for (system, weights), results in taken.items():
        spread, billions = spread_of([each["s"] for each in results], "s"), results[0]["params"] / 1e9
        rows.append(
            {
                "system": system,
                "weights": weights,
                "params": results[0]["params"],
                **spread,
                "s_per_1e9": spread["s"] / billions,
                "cpu_s_per_1e9": spread_of([each["cpu_s"] for each in results], "s")["s"] / billions,
                "peak_rss_bytes": max(each["peak_rss_bytes"] for each in results),
            }
        )
    return rows


def main() -> None:
    """Measure all, or be the child that builds one engine."""
    options = parse_arguments()
    if options.child:
        print(json.dumps(build(options)), flush=True)
        return
    settings = {name: getattr(options, name) for name in ("layers", "hidden", "device", "rounds")}
    settings["usable_processors"] = len(os.sched_getaffinity(0))
    write_results(options.json, measure(options), COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
