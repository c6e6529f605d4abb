"""Train GPT-2 small (124 M parameters) on Python's own sources, with most of it on disk. `make quickstart` runs this.

With plain PyTorch, weights, gradients and AdamW's moments take 2 GB before the first activation. Here the engine may
hold a third of that in memory: the moments live in a swap file, and the weights of most blocks are fetched from it
twice a step, for forward and for backward, while the blocks before them compute.

The training loop is the usual one: see `train`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_training import (
    ResumableSteps,
    TrainingDisplay,
    add_checkpoint_arguments,
    add_record_argument,
    check_disk_space,
    enable_checkpointing,
    encode,
    print_memory_table,
    random_windows,
    read_stdlib,
    recorded,
    resident_nbytes,
    run_example,
    write_summary,
)
from rich.console import Console

from gemini import GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig
from gemini.nn import use_sliced_loss
from gemini.recipe.dtype import choose_dtype

HOST_BUDGETS = {torch.float32: "540MiB", torch.bfloat16: "440MiB"}
NVME_BUDGET_NBYTES = 2 * 2**30
TEXT_NBYTES, TINY_TEXT_NBYTES = 1_000_000, 100_000
VOCAB_SIZE = 2048
NUM_ROWS, NUM_TOKENS = 2, 96
NUM_WARM_UP_STEPS = 5
TINY_HOST_BUDGETS = {torch.float32: "3.6MiB", torch.bfloat16: "2.8MiB"}
TINY_TILE_NUMEL = 2**14
TINY_SHAPE = {"n_layer": 6, "n_embd": 64, "n_head": 4, "vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides first weights and batches (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate after warm-up (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="working weights (%(default)s)"
    )
    parser.add_argument(
        "--host-budget", help='memory for the engine, such as "640MiB" (540MiB in fp32, 440MiB in bf16)'
    )
    parser.add_argument("--nvme", type=Path, help="directory for the swap file (OUT/swap)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where results go (%(default)s)")
    add_checkpoint_arguments(parser)
    add_record_argument(parser)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # a small model, for the tests
    return parser.parse_args()


def build_model(*, is_tiny: bool) -> Any:
    """Describe the model without giving it memory; the engine initialises it unit by unit."""
    shape: dict[str, Any] = TINY_SHAPE if is_tiny else {}
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **shape)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers reads it from a class's name; GPT-2's has none, and it warns
    enable_checkpointing(model)
    use_sliced_loss(model)
    return model.train()


def train(
    engine: GeminiDDP, batches: Iterator[torch.Tensor], display: TrainingDisplay, *, arguments: argparse.Namespace
) -> None:
    """Train on one batch a step."""
    optimizer = HybridAdam(engine.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / NUM_WARM_UP_STEPS))
    steps = ResumableSteps(engine, arguments, scheduler=schedule, console=display.console)
    display.begin_at(steps.first)
    for _, ids in zip(steps, islice(batches, steps.first, None), strict=False):
        loss = engine(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        display.step_done(loss.item())


def run(console: Console, arguments: argparse.Namespace) -> None:
    """Prepare, train and report."""
    start = time.perf_counter()
    import_nbytes = resident_nbytes()["now"]
    dtype, reason = choose_dtype(arguments.dtype, torch.device("cpu"))
    console.print(f"Working weights: {reason}")
    texts = read_stdlib(TINY_TEXT_NBYTES if arguments.tiny else TEXT_NBYTES)
    ids = encode(texts, vocab_size=VOCAB_SIZE, cache=arguments.out)
    console.print(f"Text: the standard library's sources, {len(ids):,} tokens of byte-level BPE")
    batches = random_windows(ids, num_rows=NUM_ROWS, num_tokens=NUM_TOKENS, seed=arguments.seed)
    encoded = time.perf_counter()

    swap = arguments.nvme or arguments.out / "swap"
    check_disk_space(swap, NVME_BUDGET_NBYTES)
    is_tiny = arguments.tiny
    config = GeminiConfig(
        device="cpu",
        dtype=dtype,
        host_budget=arguments.host_budget or (TINY_HOST_BUDGETS if is_tiny else HOST_BUDGETS)[dtype],
        nvme=NVMeConfig(path=swap, budget=NVME_BUDGET_NBYTES),
        tile_numel=TINY_TILE_NUMEL if is_tiny else 2**19,
        seed=arguments.seed,
    )
    with GeminiDDP(build_model(is_tiny=is_tiny), config) as engine:
        built = time.perf_counter()
        report = engine.memory_report()
        console.print(
            f"Model: {report.num_params:,} parameters in {report.num_chunks} chunks, {report.num_resident_chunks} of "
            f"them always in memory; swap file in {swap}"
        )
        num_tokens = NUM_ROWS * NUM_TOKENS
        with (
            recorded(engine, arguments.record, console) as recorder,
            TrainingDisplay(
                engine, num_steps=arguments.steps, num_tokens=num_tokens, console=console, recorder=recorder
            ) as display,
        ):
            train(engine, batches, display, arguments=arguments)
        report = engine.memory_report()
    trained = time.perf_counter()

    print_memory_table(report, import_nbytes=import_nbytes, console=console)
    write_summary(
        arguments.out / "summary.json",
        log=display.log,
        report=report,
        settings={**vars(arguments), "dtype": str(dtype), "host_budget": config.host_budget},
        import_nbytes=import_nbytes,
        phase_s={"text": encoded - start, "construction": built - encoded, "steps": trained - built},
    )
    log = display.log
    if log.losses:
        console.print(
            f"Loss {log.losses[0]:.2f} -> {log.losses[-1]:.2f} in {len(log.losses)} steps of {log.num_tokens} tokens, "
            f"{log.tokens_per_s:.0f} tokens/s, {time.perf_counter() - start:.0f} s in all"
        )
    console.print(f"Details: {arguments.out / 'summary.json'}")


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(run_example(lambda console: run(console, arguments)))
