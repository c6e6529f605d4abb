"""Train a Llama whose layers are divided among processes, and whose states are shared out among more of them:

    torchrun --nproc-per-node 4 examples/train_tensor_parallel.py --tp 2

The processes form a grid. Those of a row are given the same text and divide each linear layer and the embedding among
themselves, with torch.distributed.tensor.parallel; those of a column train on text of their own, and each has its shard
of weights, gradients and optimizer state. The training loop is that of one process. At the end each process's bytes are
shown, tier by tier.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from lm_training import check_disk_space, enable_checkpointing, random_windows, run_example
from quickstart import NUM_ROWS, NUM_TOKENS, VOCAB_SIZE
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from train_zero import encode_once, print_ranks

import zero
from gemini import GeminiConfig, HybridAdam, NVMeConfig

NVME_BUDGET_NBYTES = 2**30
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (%(default)s)")
    parser.add_argument(
        "--tp", type=int, default=2, help="processes that divide the layers among themselves (%(default)s)"
    )
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="what is sharded (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides first weights and batches (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (%(default)s)")
    parser.add_argument("--host-budget", default="300MiB", help="memory for all processes together (%(default)s)")
    parser.add_argument("--nvme", type=Path, help="directory for the swap files (OUT/swap)")
    parser.add_argument("--out", type=Path, default=Path("runs/tensor_parallel"), help="where results go (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # a small model, for the tests
    return parser.parse_args()


def build_model(tensor_mesh: DeviceMesh, *, is_tiny: bool) -> torch.nn.Module:
    """Describe the model without giving it memory, and divide its layers over a mesh."""
    shape = {**(TINY_SHAPE if is_tiny else SHAPE), "vocab_size": VOCAB_SIZE, "max_position_embeddings": 512}
    config = transformers.LlamaConfig(bos_token_id=0, eos_token_id=0, pad_token_id=None, use_cache=False, **shape)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "model.layers.*.self_attn.q_proj": ColwiseParallel(),
        "model.layers.*.self_attn.k_proj": ColwiseParallel(),
        "model.layers.*.self_attn.v_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, tensor_mesh, plan)
    enable_checkpointing(model)
    return model.train()


def run(console: Console, arguments: argparse.Namespace) -> None:
    """Prepare, train and report."""
    dist.init_process_group("gloo")
    if dist.get_rank() != 0:
        console.file = io.StringIO()
    torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
    num_rows = dist.get_world_size() // arguments.tp
    mesh = init_device_mesh("cpu", (num_rows, arguments.tp), mesh_dim_names=("dp", "tp"))
    ids = encode_once(arguments)
    seed = arguments.seed * num_rows + mesh.get_local_rank("dp")
    batches = random_windows(ids, num_rows=NUM_ROWS, num_tokens=NUM_TOKENS, seed=seed)
    swap = arguments.nvme or arguments.out / "swap"
    check_disk_space(swap, NVME_BUDGET_NBYTES)
    config = GeminiConfig(
        device="cpu",
        dtype=torch.float32,
        host_budget=arguments.host_budget,
        nvme=NVMeConfig(path=swap, budget=NVME_BUDGET_NBYTES),
        tile_numel=2**16,
        seed=arguments.seed,
    )
    console.print(f"{num_rows} x {arguments.tp} processes, stage {arguments.stage}")
    model = build_model(mesh["tp"], is_tiny=arguments.tiny)
    with zero.shard(model, config, stage=arguments.stage, mesh=mesh["dp"]) as engine:
        optimizer = HybridAdam(engine.parameters(), lr=arguments.lr, weight_decay=0.1, max_grad_norm=1.0)
        for step, batch in enumerate(islice(batches, arguments.steps), start=1):
            start = time.perf_counter()
            loss = engine(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
            console.print(f"step {step}: loss {mean.item():.3f}, {time.perf_counter() - start:.2f} s")
        print_ranks(engine.memory_report(), console)
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(run_example(lambda console: run(console, arguments)))
