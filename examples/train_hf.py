"""Train a Hugging Face causal language model of a given shape from scratch, within memory budgets.

    python examples/train_hf.py --model gpt2-large --nvme /nvme/swap --host-budget 2GiB --checkpoint-activations

The model is built without memory and initialised unit by unit straight into its homes, so that it is never whole in
memory. Nothing is downloaded: shapes are written below, or come from a config.json of yours.
"""

from __future__ import annotations

import argparse
import shutil
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

from gemini import ConfigError, GeminiConfig, GeminiDDP, HybridAdam, NVMeConfig
from gemini.nn import use_sliced_loss
from gemini.recipe.dtype import choose_dtype

_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **_NO_DROPOUT},
    "gpt2-medium": {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16, **_NO_DROPOUT},
    "gpt2-large": {"model_type": "gpt2", "n_layer": 36, "n_embd": 1280, "n_head": 20, **_NO_DROPOUT},
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, **_NO_DROPOUT},
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-7b": {"model_type": "llama"},  # transformers' default shape
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Shapes by name: arguments of the transformers configuration of that model type."""

_MAX_VOCAB_SIZE = 8192
"""Of the tokenizer trained here; a model's larger vocabulary is computed in full and partly unused."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=SHAPES, default="gpt2-large", help="a shape known here (%(default)s)")
    model.add_argument("--config", type=Path, help="instead: a config.json, or a directory with one")
    model.add_argument(
        "--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="working weights (%(default)s)"
    )
    model.add_argument("--checkpoint-activations", action="store_true", help="recompute activations in backward")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--device", help='"cuda" or "cpu" (cuda if there is one)')
    memory.add_argument("--device-budget", help='GPU memory for everything, such as "8GiB" (what is free)')
    memory.add_argument("--host-budget", help='host memory for the engine, such as "2GiB" (nearly all that is free)')
    memory.add_argument("--nvme", type=Path, help="directory for a swap file (none)")
    memory.add_argument("--nvme-budget", help="bytes the swap file may take (90 %% of what is free)")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=3, help="optimizer steps (%(default)s)")
    training.add_argument("--tokens", type=int, default=256, help="tokens of one forward and backward (%(default)s)")
    training.add_argument("--seq", type=int, default=256, help="tokens of one sequence (%(default)s)")
    training.add_argument("--accumulate", type=int, default=1, help="backward passes per step (%(default)s)")
    training.add_argument("--lr", type=float, default=1e-4, help="learning rate (%(default)s)")
    training.add_argument("--seed", type=int, default=0, help="decides first weights and batches (%(default)s)")
    training.add_argument(
        "--text", default="stdlib", help='a text file, or "stdlib": Python\'s own sources (%(default)s)'
    )
    training.add_argument("--cache", type=Path, default=Path("runs/train_hf"), help="for the tokenizer (%(default)s)")
    training.add_argument("--json", type=Path, help="write a summary there")
    add_checkpoint_arguments(parser)
    add_record_argument(parser)
    return parser.parse_args()


def build_model(arguments: argparse.Namespace) -> tuple[Any, int]:
    """Describe the model without giving it memory; return it and its vocabulary's size."""
    if arguments.config is not None:
        config = transformers.AutoConfig.from_pretrained(arguments.config, local_files_only=True)
    else:
        config = transformers.AutoConfig.for_model(**SHAPES[arguments.model])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.use_cache = False
    model.loss_type = model.loss_type or "ForCausalLM"  # None where the class's name does not tell; it would warn
    if arguments.checkpoint_activations:
        enable_checkpointing(model)
    use_sliced_loss(model)
    return model.train(), config.vocab_size


def make_config(arguments: argparse.Namespace, console: Console) -> GeminiConfig:
    """Turn the command line into the engine's configuration."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, reason = choose_dtype(arguments.dtype, device)
    console.print(f"Working weights on {device}: {reason}")
    nvme = None
    if arguments.nvme is not None:
        arguments.nvme.mkdir(parents=True, exist_ok=True)
        budget = arguments.nvme_budget or shutil.disk_usage(arguments.nvme).free * 9 // 10
        nvme = NVMeConfig(path=arguments.nvme, budget=budget)
    return GeminiConfig(
        device=device,
        dtype=dtype,
        device_budget=arguments.device_budget,
        host_budget=arguments.host_budget,
        nvme=nvme,
        gradient_accumulation=arguments.accumulate > 1,
        seed=arguments.seed,
    )


def train(
    engine: GeminiDDP,
    batches: Iterator[torch.Tensor],
    display: TrainingDisplay,
    *,
    arguments: argparse.Namespace,
) -> None:
    """Train with gradient accumulation."""
    optimizer = HybridAdam(engine.parameters(), lr=arguments.lr, weight_decay=0.1, max_grad_norm=1.0)
    device = engine.runtime.resources.transfers.device
    steps = ResumableSteps(engine, arguments, console=display.console)
    display.begin_at(steps.first)
    batches = islice(batches, steps.first * arguments.accumulate, None)
    for _ in steps:
        total = 0.0
        for _ in range(arguments.accumulate):
            ids = next(batches).to(device)
            loss = engine(input_ids=ids, labels=ids).loss / arguments.accumulate
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        display.step_done(total)


def run(console: Console, arguments: argparse.Namespace) -> None:
    """Prepare, train and report."""
    start = time.perf_counter()
    import_nbytes = resident_nbytes()["now"]
    num_rows, remainder = divmod(arguments.tokens, arguments.seq)
    if remainder or not num_rows:
        raise ConfigError(f"--tokens: expected a multiple of --seq ({arguments.seq}), got {arguments.tokens}")
    model, vocab_size = build_model(arguments)
    texts = read_stdlib(1_000_000) if arguments.text == "stdlib" else [Path(arguments.text).read_text(encoding="utf-8")]
    ids = encode(texts, vocab_size=min(vocab_size, _MAX_VOCAB_SIZE), cache=arguments.cache)
    batches = random_windows(ids, num_rows=num_rows, num_tokens=arguments.seq, seed=arguments.seed)
    config = make_config(arguments, console)

    encoded = time.perf_counter()
    with GeminiDDP(model, config) as engine:
        built = time.perf_counter()
        report = engine.memory_report()
        console.print(
            f"Model: {report.num_params:,} parameters in {report.num_chunks} chunks, {report.num_resident_chunks} of "
            f"them always in memory; built in {built - encoded:.1f} s"
        )
        num_tokens = arguments.tokens * arguments.accumulate
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
    log = display.log
    if log.losses:
        steps = ", ".join(f"{seconds:.1f}" for seconds in log.seconds)
        console.print(
            f"Loss {log.losses[0]:.3f} -> {log.losses[-1]:.3f}; {log.tokens_per_s:.1f} tokens/s; steps of {steps} s"
        )
    if arguments.json is not None:
        write_summary(
            arguments.json,
            log=log,
            report=report,
            settings={**vars(arguments), "dtype": config.dtype},
            import_nbytes=import_nbytes,
            phase_s={"text": encoded - start, "construction": built - encoded, "steps": trained - built},
        )


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(run_example(lambda console: run(console, arguments)))
