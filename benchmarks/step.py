"""Seconds and resident memory of a training step, beside plain PyTorch on the same model, batch and machine.

Every variant runs in a process of its own, one after the other:

    plain        torch.optim.AdamW (fused), everything in memory
    host         GeminiDDP, everything in host memory
    state        GeminiDDP, optimizer state on disk
    disk         GeminiDDP, weights, gradients and state on disk

Usage: python benchmarks/step.py --swap DIR [--model gpt2] [--tokens 256] [--dtype fp32] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from environment import describe_environment

SHAPES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = ("plain", "host", "state", "disk")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--swap", type=Path, required=True, help="directory for the swap file")
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a step, one sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; two more come first")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def build_model(arguments: argparse.Namespace, device: str) -> torch.nn.Module:
    """Build the model with dropout off and activation checkpointing on."""
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_positions=max(arguments.tokens, 64), use_cache=False, **SHAPES[arguments.model], **no_dropout)
    with torch.device(device):
        model = GPT2LMHeadModel(config)
    model.gradient_checkpointing_enable()
    return model.train()


def run_variant(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in this process and measure."""
    torch.manual_seed(0)
    start = time.perf_counter()
    if arguments.run == "plain":
        engine: Any = build_model(arguments, "cpu").to(DTYPES[arguments.dtype])
        optimizer: Any = torch.optim.AdamW(engine.parameters(), lr=1e-4, fused=True)
    else:
        from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement

        on_disk = {"host": {}, "state": {"state_nvme": 1}, "disk": {"param_nvme": 1, "state_nvme": 1, "grad_nvme": 1}}
        config = GeminiConfig(
            device="cpu",
            dtype=DTYPES[arguments.dtype],
            nvme=NVMeConfig(path=arguments.swap, budget="64GiB"),
            placement=StaticPlacement(**on_disk[arguments.run]),
            gradient_accumulation=False,
        )
        engine = GeminiDDP(build_model(arguments, "meta"), config)
        optimizer = HybridAdam(engine.parameters(), lr=1e-4)
    setup_s = time.perf_counter() - start
    seconds, loss = train(engine, optimizer, arguments)
    result = {
        "variant": arguments.run,
        "setup_s": setup_s,
        "step_s": median(seconds),
        "step_s_min": min(seconds),
        "step_s_max": max(seconds),
        "peak_rss_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "last_loss": loss,
        "num_params": sum(p.numel() for p in engine.parameters()),
    }
    if arguments.run != "plain":
        report = engine.memory_report()
        result |= {"fetch_stall_s": report.fetch_stall_s, "update_stall_s": report.update_stall_s}
        engine.close()
    return result


def train(engine: Any, optimizer: Any, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """Return the seconds of the timed steps, optimizer included, and the last loss."""
    vocabulary = SHAPES[arguments.model].get("vocab_size", 50257)
    batch = torch.randint(0, vocabulary, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    seconds = []
    for _ in range(arguments.steps + 2):
        start = time.perf_counter()
        loss = engine(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[2:], loss.item()


def main() -> None:
    """Run every variant, or, in a child, one."""
    arguments = parse_arguments()
    if arguments.run:
        print(json.dumps(run_variant(arguments)))
        return
    rows = []
    for variant in arguments.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--run", variant]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{variant:6} {row['step_s']:7.2f} s a step ({row['step_s_min']:.2f}-{row['step_s_max']:.2f}), "
            f"{row['step_s'] / rows[0]['step_s']:5.2f} of {rows[0]['variant']}, "
            f"peak {row['peak_rss_nbytes'] / 1e9:5.2f} GB, set-up {row['setup_s']:.1f} s, loss {row['last_loss']:.4f}",
            flush=True,
        )
    if arguments.json:
        paths = ("swap", "json", "run")
        settings = {name: value for name, value in vars(arguments).items() if name not in paths}
        document = {"environment": describe_environment(), "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
