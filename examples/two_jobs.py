"""A LoRA fine-tuning that has its memory from the node's service; two_jobs.md runs two of them side by side.

python examples/two_jobs.py base DIRECTORY
python examples/two_jobs.py train DIRECTORY --job NAME [--socket PATH] [--rank 8] [--steps 30]
"""

from __future__ import annotations

import argparse
import hashlib
from itertools import islice
from pathlib import Path

import torch
import transformers
from lm_training import encode, random_windows, read_stdlib, run_example
from rich.console import Console

from gemini import GeminiConfig, GeminiDDP, HybridAdam

NUM_ROWS, NUM_TOKENS = 1, 64
TEXT_NBYTES, VOCAB_SIZE = 2 << 20, 4096


def make_base(directory: Path) -> None:
    """Save GPT-2's shape with random weights, in place of a model that was downloaded, and a text to learn."""
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(directory)
    read_tokens(directory)


def read_tokens(directory: Path) -> torch.Tensor:
    """Return the text's tokens, int64 [any]."""
    return encode(read_stdlib(TEXT_NBYTES), vocab_size=VOCAB_SIZE, cache=directory / "text")


def train(options: argparse.Namespace, console: Console) -> None:
    """Train adapters over the frozen base, from where a killed run of this job stood."""
    import peft

    torch.manual_seed(0)  # of dropout; a commit holds where it stands
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(options.base))
        base.loss_type = "ForCausalLM"  # transformers reads it from a class's name; GPT-2's has none, and it warns
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=options.rank, target_modules=["c_attn"], fan_in_fan_out=True)
        )
    alone = options.socket is None
    config = GeminiConfig(
        device="cpu",
        dtype=torch.float32,
        host_budget="1GiB",
        service=None if alone else f"unix:{options.socket}",
        job=None if alone else options.job,
        snapshots=not alone,
    )
    batches = random_windows(read_tokens(options.base), num_rows=NUM_ROWS, num_tokens=NUM_TOKENS, seed=0)
    with GeminiDDP(model, config, weights=options.base) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=1e-3)
        first = 0
        if engine.recovered is not None:
            first = engine.recover().extra["step"]
            console.print(f"{options.job} goes on after step {first}")
        for step, batch in enumerate(islice(batches, options.steps)):
            if step < first:
                continue
            loss = engine(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if not alone:
                engine.commit(extra={"step": step + 1})
            console.print(f"{options.job} step {step + 1} loss {loss.item():.6f}")
        trained = {name: value for name, value in engine.state_dict().items() if "lora" in name}
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(trained.items())))
    console.print(f"{options.job} trained, adapters {digest.hexdigest()[:16]}")


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("base", "train"):
        command = commands.add_parser(name)
        command.add_argument("base", type=Path, metavar="DIRECTORY", help="the base model's")
    command.add_argument("--job", required=True, help="what the service calls it")
    command.add_argument("--socket", help="the service's; without one the engine is alone")
    command.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    command.add_argument("--steps", type=int, default=30, help="to train (%(default)s)")
    options = parser.parse_args()
    if options.command == "base":
        make_base(options.base)
        return 0
    return run_example(lambda console: train(options, console))


if __name__ == "__main__":
    raise SystemExit(main())
