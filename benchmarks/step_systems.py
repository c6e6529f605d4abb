"""One training run of one system, in a process of its own; prints one JSON line.

    plain           torch.optim.AdamW (fused) in float32, forward and backward under autocast unless --dtype fp32
    gemini-host     GeminiDDP, everything in host memory
    gemini-nvme     GeminiDDP, all but the embedding on disk
    deepspeed-host  DeepSpeed ZeRO-3, optimizer and parameters offloaded to the CPU
    deepspeed-nvme  DeepSpeed ZeRO-3, optimizer and parameters offloaded to disk

Called by step.py, which says what the options mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from resident_memory import peak_resident_nbytes
from training_step import Step, deepspeed_step, enable_checkpointing, training_step

SHAPES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SYSTEMS = ("plain", "gemini-host", "gemini-nvme", "deepspeed-host", "deepspeed-nvme")
MAX_NORMS = {"idle": 1e6, "active": 1e-3}
"""A threshold that no step reaches, and one that every step exceeds."""
LR = 1e-5
NUM_WARM_UPS = 2
"""Steps that come first: allocations, the trace, and the measurements by which an overlap is chosen."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that a child shares with step.py."""
    parser.add_argument("--model", choices=SHAPES, default="gpt2-medium")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--seq", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 if it is the faster one")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--swap", type=Path, help="directory on the drive to use (a temporary one here)")
    parser.add_argument("--overlap", default="auto", help="GeminiConfig.overlap")


def shape_of(model: str) -> dict[str, int]:
    """Return the shape of a name in SHAPES, or of "gpt-L": L layers and L heads, each head 80 wide."""
    if model in SHAPES:
        return SHAPES[model]
    layers = int(model.removeprefix("gpt-"))
    return {"n_layer": layers, "n_embd": 80 * layers, "n_head": layers}


def build_model(model: str, seq: int, device: str, *, checkpoints: bool = True) -> torch.nn.Module:
    """Build a GPT-2 with random weights and dropout off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_positions=max(seq, 64), use_cache=False, **shape_of(model), **no_dropout)
    with torch.device(device):
        built = GPT2LMHeadModel(config)
    built.loss_type = "ForCausalLM"  # transformers reads it from a class's name; GPT-2's has none, and it warns
    if checkpoints:
        enable_checkpointing(built)
    return built.train()


def make_plain(options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Return a step of plain PyTorch."""
    model = build_model(options.model, options.seq, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    step = training_step(
        model,
        optimizer,
        max_norm=MAX_NORMS[options.clip],
        precision=lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.dtype == "bf16"),
    )
    return step, lambda: {"params": sum(p.numel() for p in model.parameters())}


def make_gemini(options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Return a step of GeminiDDP."""
    from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig
    from gemini.assembly.blueprint import draw_blueprint
    from gemini.errors import OutOfTierMemoryError
    from gemini.nn import use_sliced_loss

    def config_with(**fields: Any) -> GeminiConfig:
        return GeminiConfig(
            device="cpu",
            dtype=DTYPES[options.dtype],
            gradient_accumulation=False,
            overlap=options.overlap,
            tile_numel=1 << 19,
            **fields,
        )

    model = build_model(options.model, options.seq, "meta")
    use_sliced_loss(model, keep_logits=True)
    config = config_with()
    if options.system == "gemini-nvme":
        nvme = NVMeConfig(path=options.swap, budget="64GiB")
        for budget in (n << 20 for n in range(32, 1 << 20, 32)):  # the smallest that the model can be trained in
            config = config_with(nvme=nvme, host_budget=budget)
            try:
                draw_blueprint(model, config)
            except OutOfTierMemoryError:
                continue
            break
    engine = GeminiDDP(model, config)
    optimizer = HybridAdam(engine.parameters(), lr=LR, max_grad_norm=MAX_NORMS[options.clip])

    def finish() -> dict[str, Any]:
        report = engine.memory_report()
        engine.close()
        return {
            "params": report.num_params,
            "host_budget_bytes": config.host_budget,
            "read_bytes": report.nvme_read_nbytes,
            "written_bytes": report.nvme_written_nbytes,
            "fetch_stall_s": report.fetch_stall_s,
            "update_stall_s": report.update_stall_s,
            "updates": report.updates.num_updates,
            "updates_ahead": report.updates.num_ahead,
            "updates_redone": report.updates.num_redone,
        }

    return training_step(engine, optimizer), finish


def deepspeed_settings(batch: int, *, max_norm: float, zero: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration: AdamW in float32 and what `zero` says of sharding and offload."""
    return {
        "train_micro_batch_size_per_gpu": batch,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 1e-2}},
        "gradient_clipping": max_norm,
        "zero_optimization": zero,
    }


def make_deepspeed(options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Return a step of DeepSpeed ZeRO-3 with offload."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29511")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    where: dict[str, Any] = {"device": "cpu"}
    if options.system == "deepspeed-nvme":
        where = {"device": "nvme", "nvme_path": str(options.swap)}
    shape = shape_of(options.model)
    zero = {
        "stage": 3,
        "offload_optimizer": {**where, "pipeline_read": True, "pipeline_write": True, "buffer_count": 4},
        "offload_param": {
            **where,
            "buffer_count": 5,
            "buffer_size": shape["n_embd"] * shape.get("vocab_size", 50257),
        },
    }
    settings = {
        **deepspeed_settings(options.batch, max_norm=MAX_NORMS[options.clip], zero=zero),
        "bf16": {"enabled": options.dtype == "bf16"},
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True},
    }
    deepspeed.init_distributed(dist_backend="gloo")
    model = build_model(options.model, options.seq, "cpu")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return deepspeed_step(engine), lambda: {
        "params": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    }


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--clip", choices=MAX_NORMS, default="idle")
    options = parser.parse_args()
    makers = {"plain": make_plain, "gemini": make_gemini, "deepspeed": make_deepspeed}
    torch.manual_seed(0)
    start = time.perf_counter()
    step, finish = makers[options.system.partition("-")[0]](options)
    setup_s = time.perf_counter() - start
    vocabulary = SHAPES[options.model].get("vocab_size", 50257)
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    for _ in range(NUM_WARM_UPS + options.steps):
        batch = torch.randint(0, vocabulary, (options.batch, options.seq), generator=generator)
        start = time.perf_counter()
        losses.append(float(step(batch)))
        seconds.append(time.perf_counter() - start)
    timed = seconds[NUM_WARM_UPS:]
    result = {
        "step_s": statistics.median(timed),
        "step_s_min": min(timed),
        "step_s_max": max(timed),
        "tokens_per_s": options.batch * options.seq / statistics.median(timed),
        "peak_rss_bytes": peak_resident_nbytes(),
        "setup_s": setup_s,
        "last_loss": losses[-1],
        **finish(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
