"""One training run of one system on a GPU, in a process of its own.

It prints a line of JSON when it is ready, one for each step, one when it has trained, and one with all of its numbers.

    torch-autocast  everything on the GPU: float32 weights under bf16 autocast, torch.optim.AdamW (fused), 16 bytes a
                    parameter; what the others' precision is to be compared with
    torch-bf16      everything on the GPU: weights, gradients and moments in bf16, 8 bytes a parameter; less precise
    gemini-host     GeminiDDP, all optimizer state in host memory; weights on the GPU as far as the cap allows
    gemini-stream   GeminiDDP, all optimizer state and weights in host memory; weights pass through slots
    gemini-auto     GeminiDDP, placed as it sees fit
    deepspeed-host  DeepSpeed ZeRO-2, optimizer offloaded to the CPU, copies overlapped; its buffers are pinned if host
                    memory suffices for torch's rounding of them, and `is_pinned` says so
    torchao-host    torchao's CPUOffloadOptimizer, gradients offloaded too; all state in bf16, and it cannot clip

All compute in bf16, checkpoint every block's activations (gemini with slices by itself), and take the loss in slices of
the vocabulary. Called by gpu.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from resident_memory import peak_resident_nbytes
from training_step import Step, deepspeed_step, enable_checkpointing, training_step

SHAPES: dict[str, dict[str, int]] = {
    "llama-0.1b": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "llama-0.4b": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "llama-0.7b": {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 12},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
    },
}
"""Arguments of transformers' LlamaConfig; the vocabulary has 32000 tokens unless said."""
SYSTEMS = (
    "torch-autocast",
    "torch-bf16",
    "gemini-host",
    "gemini-stream",
    "gemini-auto",
    "deepspeed-host",
    "torchao-host",
)
VOCAB_SIZE = 32_000
DEEPSPEED_BUCKET_NUMEL = 10**8
"""Gradients that travel together; the default's two buffers of 1 GB would leave Llama-7B none of 24 GB to spare."""
MAX_NORM = 1.0
LR = 1e-5
WEIGHT_DECAY = 0.1
NUM_WARM_UPS = 3
"""Steps that come first: allocations, the trace, and the measurements by which residents and an overlap are chosen."""
BUDGET_SHARE = 0.94
"""Part of the cap that gemini may plan with; the allocator's rounding and fragments take the rest."""


class System(NamedTuple):
    """What a run needs to know of a system."""

    step: Step
    finish: Callable[[], dict[str, Any]]
    """Ends it and says what is to be said."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that a child shares with gpu.py."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to see that it runs")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, at most")
    parser.add_argument("--seconds", type=float, default=15.0, help="no step is begun later than this")
    parser.add_argument("--host-budget", help="host memory to plan with, as in 100GiB (what is free now)")
    parser.add_argument("--swap", type=Path, help="directory for gemini's swap file, where host memory is short")


def llama_config(model: str) -> Any:
    """Return transformers' configuration of a shape."""
    from transformers import LlamaConfig

    return LlamaConfig(**{"vocab_size": VOCAB_SIZE, "use_cache": False, **SHAPES[model]})


def build_model(model: str, *, device: str, dtype: torch.dtype, checkpoints: bool) -> torch.nn.Module:
    """Build a Llama with random weights whose loss is taken in slices."""
    from transformers import LlamaForCausalLM

    from gemini.nn import use_sliced_loss

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            built = LlamaForCausalLM(llama_config(model))
    finally:
        torch.set_default_dtype(before)
    if checkpoints:
        enable_checkpointing(built)
    use_sliced_loss(built)
    return built.train()


def make_torch(options: argparse.Namespace) -> System:
    """Everything on the GPU, by plain PyTorch."""
    has_autocast = options.system == "torch-autocast"
    dtype = torch.float32 if has_autocast else torch.bfloat16
    model = build_model(options.model, device=options.device, dtype=dtype, checkpoints=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    step = training_step(
        model,
        optimizer,
        max_norm=MAX_NORM,
        precision=lambda: torch.autocast(options.device, dtype=torch.bfloat16, enabled=has_autocast),
    )
    return System(step, lambda: {"params": sum(param.numel() for param in model.parameters())})


def random_init(model: torch.nn.Module) -> Callable[[torch.nn.Module], None]:
    """Return an init_fn that is quick for billions of parameters: matrices repeat one block of random numbers."""
    from gemini.assembly.first_values import find_init_fn

    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    usual = find_init_fn(model)

    def init(module: torch.nn.Module) -> None:
        owned = list(module.parameters(recurse=False))
        if not owned:
            usual(module)  # buffers
        for param in owned:
            if param.is_meta:
                continue
            flat = param.data.view(-1)
            if param.dim() == 1:
                flat.fill_(1.0)
                continue
            for begin in range(0, flat.numel(), block.numel()):
                part = flat[begin : begin + block.numel()]
                part.copy_(block[: part.numel()])

    return init


def gemini_config(options: argparse.Namespace) -> Any:
    """Return the configuration of one of our runs."""
    from gemini import GeminiConfig, NVMeConfig, StaticPlacement

    placement: Any = "auto"
    if options.system == "gemini-stream":
        placement = StaticPlacement()
    nvme = None
    if options.swap is not None:
        nvme = NVMeConfig(path=options.swap, budget="400GiB" if options.model == "llama-7b" else "40GiB")
    fields: dict[str, Any] = {"tile_numel": 1 << 22, "device": "cuda", "host_budget": options.host_budget}
    if options.device == "cpu":
        fields = {"tile_numel": 4096, "device": "simulated", "host_budget": "256MiB", "num_threads": 2}
    return GeminiConfig(
        dtype=torch.bfloat16,
        device_budget=int(options.cap * BUDGET_SHARE),
        gradient_accumulation=False,
        num_batch_slices=options.slices,
        nvme=nvme,
        placement=placement,
        **fields,
    )


def keep_state_on_host(model: torch.nn.Module, config: Any) -> Any:
    """Return a configuration that keeps all state in host memory, and all the weights on the GPU that fit there."""
    from gemini import StaticPlacement
    from gemini.assembly.blueprint import draw_blueprint
    from gemini.errors import OutOfTierMemoryError

    for percent in range(100, -1, -5):
        chosen = dataclasses.replace(config, placement=StaticPlacement(param_device=percent / 100))
        try:
            draw_blueprint(model, chosen)
        except OutOfTierMemoryError:
            continue
        return chosen
    return config


def make_gemini(options: argparse.Namespace) -> System:
    """GeminiDDP, the state where the system's name says."""
    from gemini import GeminiDDP, HybridAdam

    model = build_model(options.model, device="meta", dtype=torch.float32, checkpoints=options.slices == 1)
    config = gemini_config(options)
    if options.system == "gemini-host":
        config = keep_state_on_host(model, config)
    engine = GeminiDDP(model, config, init_fn=random_init(model))
    optimizer = HybridAdam(engine.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM)

    def finish() -> dict[str, Any]:
        report = engine.memory_report()
        traffic = engine.runtime.resources.transfers.traffic
        held = {tier.tier: tier.peak_nbytes for tier in report.tiers}
        engine.close()
        return {
            "params": report.num_params,
            "slices": options.slices,
            "device_budget_bytes": config.device_budget_nbytes,
            "resident_chunks": report.num_resident_chunks,
            "chunks": report.num_chunks,
            "chunk_bytes": held,
            "uploaded_bytes": traffic.uploaded_nbytes,
            "downloaded_bytes": traffic.downloaded_nbytes,
            "fetch_stall_s": report.fetch_stall_s,
            "update_stall_s": report.update_stall_s,
        }

    return System(training_step(engine, optimizer), finish)


def deepspeed_pinned_nbytes(num_params: int) -> int:
    """Return the host bytes that DeepSpeed holds with its buffers pinned.

    Weights and gradients in float32 and weights in bf16 are one pinned buffer each, which torch rounds up to a power of
    two; the moments are not pinned.

    Args:
        num_params: parameters of the model.
    """
    pinned = sum(1 << (itemsize * num_params - 1).bit_length() for itemsize in (4, 4, 2))
    return pinned + 8 * num_params


def make_deepspeed(options: argparse.Namespace) -> System:
    """DeepSpeed ZeRO-Offload: weights on the GPU, gradients, state and update on the CPU."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29512")
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    model = build_model(options.model, device=options.device, dtype=torch.bfloat16, checkpoints=True)
    num_params = sum(param.numel() for param in model.parameters())
    is_pinned = options.device == "cuda" and deepspeed_pinned_nbytes(num_params) < host_nbytes(options)
    settings = {
        "train_micro_batch_size_per_gpu": options.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": WEIGHT_DECAY}},
        "bf16": {"enabled": True},
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": is_pinned},
            "overlap_comm": True,
            "reduce_bucket_size": DEEPSPEED_BUCKET_NUMEL,
            "allgather_bucket_size": DEEPSPEED_BUCKET_NUMEL,
        },
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return System(deepspeed_step(engine), lambda: {"params": num_params, "is_pinned": is_pinned})


def host_nbytes(options: argparse.Namespace) -> int:
    """Return the host memory to plan with."""
    from gemini.offload.resources import available_host_nbytes
    from gemini.tiers import parse_nbytes

    if options.host_budget is None:
        return available_host_nbytes()
    return parse_nbytes(options.host_budget, name="--host-budget")


def make_torchao(options: argparse.Namespace) -> System:
    """torchao's CPUOffloadOptimizer: weights on the GPU, gradients, state and update on the CPU."""
    from torchao.optim import CPUOffloadOptimizer

    model = build_model(options.model, device=options.device, dtype=torch.bfloat16, checkpoints=True)
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=True, fused=True, lr=LR, weight_decay=WEIGHT_DECAY
    )
    num_params = sum(param.numel() for param in model.parameters())
    return System(training_step(model, optimizer), lambda: {"params": num_params})


class DevicePeak:
    """The most device memory that tensors took. The engine resets torch's own peak in every step, so it is read often.

    Args:
        device: of the run; memory is counted on CUDA only.
    """

    def __init__(self, device: str) -> None:
        self.allocated_nbytes = 0
        self.reserved_nbytes = 0
        self._is_cuda = device == "cuda"

    def note(self) -> None:
        """Take what torch has seen since it was last reset into account."""
        if self._is_cuda:
            self.allocated_nbytes = max(self.allocated_nbytes, torch.cuda.max_memory_allocated())
            self.reserved_nbytes = max(self.reserved_nbytes, torch.cuda.max_memory_reserved())


def cap_device(device: str, cap_nbytes: int) -> None:
    """Let torch take no more device memory than a smaller card has."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(cap_nbytes / total, 1.0))


def tell(stage: str, **figures: float) -> None:
    """Say how far the run has come; whoever follows it ends it by what it has said."""
    print(json.dumps({"stage": stage, **figures}), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure.

    Args:
        options: of the command line.

    Returns:
        The fields of a row that follow from the run.
    """
    makers = {"torch": make_torch, "gemini": make_gemini, "deepspeed": make_deepspeed, "torchao": make_torchao}
    torch.manual_seed(0)
    peak = DevicePeak(options.device)
    cap_device(options.device, options.cap)
    start = time.perf_counter()
    system = makers[options.system.partition("-")[0]](options)
    setup_s = time.perf_counter() - start
    tell("ready", setup_s=setup_s)
    peak.note()
    generator = torch.Generator().manual_seed(1)
    vocab_size = SHAPES[options.model].get("vocab_size", VOCAB_SIZE)
    seconds: list[float] = []
    losses = []
    while len(seconds) < NUM_WARM_UPS + options.steps:
        if len(seconds) > NUM_WARM_UPS and sum(seconds[NUM_WARM_UPS:]) > options.seconds:
            break
        batch = torch.randint(0, vocab_size, (options.batch, options.seq), generator=generator)
        start = time.perf_counter()
        losses.append(float(system.step(batch.to(options.device))))  # waits for the device, as a log does
        seconds.append(time.perf_counter() - start)
        tell("step", s=seconds[-1])
        peak.note()
    tell("trained")
    timed = seconds[NUM_WARM_UPS:]
    return {
        "step_s": statistics.median(timed),
        "step_s_min": min(timed),
        "step_s_max": max(timed),
        "steps": len(timed),
        "tokens_per_s": options.batch * options.seq / statistics.median(timed),
        "peak_device_bytes": peak.allocated_nbytes,
        "peak_reserved_bytes": peak.reserved_nbytes,
        "peak_rss_bytes": peak_resident_nbytes(),
        "setup_s": setup_s,
        "last_loss": losses[-1],
        **system.finish(),
    }


def main() -> None:
    """Train one system and print its numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--cap", type=int, required=True, help="bytes of device memory that may be taken")
    parser.add_argument("--slices", type=int, default=1, help="GeminiConfig.num_batch_slices")
    print(json.dumps(measure(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
