"""A large batch through a model whose weights and state are on disk: in slices, and by gradient accumulation.

Every variant trains on the same batch, in a process of its own, one after the other:

    slices N         GeminiDDP(num_batch_slices=N): one forward and backward, each block in N slices
    accumulation N   GeminiDDP, N micro-batches, each with a forward and backward of its own, one optimizer step
    checkpointed N   the same with activation checkpointing
    torch N          accumulation with torch.optim.AdamW and everything in memory

"slices 1" and "accumulation 1" are the same thing, a batch that runs whole. Slices run each block a second time in
backward, and so does checkpointing; accumulation alone keeps the activations of a micro-batch and does not.

Usage: python benchmarks/slices.py --swap DIR [--rows 8] [--tokens 64] [--layers 12] [--width 768] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from resident_memory import peak_resident_nbytes
from results_file import missing_row, spread_of, write_results
from training_step import enable_checkpointing

VARIANTS = (
    *("slices:1", "slices:2", "slices:4", "slices:8", "accumulation:2", "accumulation:4", "accumulation:8"),
    *("checkpointed:2", "checkpointed:4", "checkpointed:8", "torch:4"),
)
SYSTEMS = dict.fromkeys(("slices", "accumulation", "checkpointed"), "gemini nvme") | {"torch": "torch host"}
COLUMNS = ("system", "variant", "step_s", "tokens_per_s", "peak_rss_bytes", "read_bytes", "written_bytes", "last_loss")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--swap", type=Path, required=True, help="directory for the swap file")
    parser.add_argument("--rows", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3, help="timed steps; two more come first")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="such as slices:4")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def build_model(arguments: argparse.Namespace, device: str) -> Any:
    """Build a GPT-2 shape in float32 with dropout off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=arguments.layers,
        n_embd=arguments.width,
        n_head=arguments.width // 64,
        vocab_size=arguments.vocabulary,
        n_positions=max(arguments.tokens, 64),
        use_cache=False,
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        **{"bos_token_id": 0, "eos_token_id": 0},
    )
    with torch.device(device):
        return GPT2LMHeadModel(config).train()


def run_variant(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in this process and measure."""
    kind, count = arguments.run.split(":")
    num_micro_batches = 1 if kind == "slices" else int(count)
    torch.manual_seed(0)
    if kind == "torch":
        engine: Any = build_model(arguments, "cpu")
        optimizer: Any = torch.optim.AdamW(engine.parameters(), lr=1e-4, fused=True)
    else:
        from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig, StaticPlacement

        config = GeminiConfig(
            device="cpu",
            dtype=torch.float32,
            nvme=NVMeConfig(path=arguments.swap, budget="64GiB"),
            placement=StaticPlacement(param_nvme=1, state_nvme=1),
            num_batch_slices=int(count) if kind == "slices" else 1,
        )
        model = build_model(arguments, "meta")
        if kind == "checkpointed":
            enable_checkpointing(model)
        engine = GeminiDDP(model, config)
        optimizer = HybridAdam(engine.parameters(), lr=1e-4)
    batch = torch.randint(
        0, arguments.vocabulary, (arguments.rows, arguments.tokens), generator=torch.Generator().manual_seed(1)
    )
    seconds, traffic, loss = [], [(0, 0)], 0.0
    for _ in range(arguments.steps + 2):
        start = time.perf_counter()
        loss = train_step(engine, optimizer, batch.chunk(num_micro_batches))
        seconds.append(time.perf_counter() - start)
        if kind != "torch":
            report = engine.memory_report()
            traffic.append((report.nvme_read_nbytes, report.nvme_written_nbytes))
    row = {
        "system": SYSTEMS[kind],
        "variant": f"{kind} {count}",
        **spread_of(seconds[2:], "step_s"),
        "tokens_per_s": batch.numel() / spread_of(seconds[2:], "step_s")["step_s"],
        "peak_rss_bytes": peak_resident_nbytes(),
        "last_loss": loss,
        "num_params": sum(param.numel() for param in engine.parameters()),
    }
    if kind != "torch":
        row["read_bytes"], row["written_bytes"] = ((traffic[-1][i] - traffic[2][i]) // arguments.steps for i in (0, 1))
        engine.close()
    return row


def train_step(engine: Any, optimizer: Any, micro_batches: Any) -> float:
    """Train one step; return the loss of the whole batch."""
    loss_of_batch = 0.0
    for part in micro_batches:
        loss = engine(input_ids=part, labels=part).loss / len(micro_batches)
        loss.backward()
        loss_of_batch += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return loss_of_batch


def main() -> None:
    """Run every variant, or, in a child, one."""
    arguments = parse_arguments()
    if arguments.run:
        print(json.dumps(run_variant(arguments)))
        return
    rows = []
    for variant in arguments.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--run", variant]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            why = child.stderr.strip().splitlines()[-1] if child.stderr.strip() else f"exit status {child.returncode}"
            rows.append(missing_row(SYSTEMS[variant.split(":")[0]], why, variant=variant.replace(":", " ")))
        else:
            rows.append(json.loads(child.stdout.splitlines()[-1]))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("swap", "json", "run")}
    write_results(arguments.json, rows, COLUMNS, settings=settings)


if __name__ == "__main__":
    main()
