"""One training run of one system on all ranks, each a process that this one starts; rank 0 prints one JSON line.

    torch            DistributedDataParallel and torch.optim.AdamW (fused); with one rank plain PyTorch
    gemini-1, -2, -3 zero.shard with that stage, everything in host memory; with one rank GeminiDDP
    fsdp2            torch's fully_shard on every block and on the model, CPUOffloadPolicy, torch.optim.AdamW (fused)
    deepspeed-3      DeepSpeed ZeRO-3, optimizer and parameters offloaded to the CPU

Called by zero_step.py, which says what the options mean.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing
from resident_memory import forget_peak, peak_resident_nbytes
from results_file import spread_of
from step_systems import LR, NUM_WARM_UPS, SHAPES, build_model, deepspeed_settings

SYSTEMS = ("torch", "gemini-1", "gemini-2", "gemini-3", "fsdp2", "deepspeed-3")
WEIGHT_DECAY = 1e-2
MAX_NORM = 1e6
"""Every system takes the norm of its gradients; no step reaches this."""
GROUP_TIMEOUT_S = 120.0

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class System:
    """A model that is being trained."""

    step: Step
    """Forward, backward and update; takes token ids [rows, tokens], returns the rank's loss."""
    state_nbytes: Callable[[], int]
    """Bytes of weights and optimizer state that this rank keeps between steps; known after the first."""


def make_torch(model: torch.nn.Module, options: argparse.Namespace) -> System:
    """Return DistributedDataParallel."""
    is_alone = dist.get_world_size() == 1
    engine = model if is_alone else torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return _with_torch_optimizer(engine)


def make_fsdp2(model: torch.nn.Module, options: argparse.Namespace) -> System:
    """Return FSDP2 with every block a unit of its own."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    offload = CPUOffloadPolicy(pin_memory=False)  # without a GPU nothing can be pinned
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)
    return _with_torch_optimizer(model)


def _with_torch_optimizer(engine: torch.nn.Module) -> System:
    optimizer = torch.optim.AdamW(engine.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(engine.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def state_nbytes() -> int:
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        return sum(_local_nbytes(tensor) for tensor in (*engine.parameters(), *moments))

    return System(step, state_nbytes)


def _local_nbytes(tensor: torch.Tensor) -> int:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.nbytes


def make_gemini(model: torch.nn.Module, options: argparse.Namespace) -> System:
    """Return our engine."""
    import zero
    from gemini import GeminiConfig, HybridAdam

    config = GeminiConfig(device="cpu", dtype=torch.float32, gradient_accumulation=False)
    engine = zero.shard(model, config, stage=int(options.system.rpartition("-")[2]))
    optimizer = HybridAdam(engine.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM)

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def state_nbytes() -> int:
        tiers = engine.memory_report().tiers
        return sum(tier.held_nbytes.get(name, 0) for tier in tiers for name in ("working", "state", "resident copies"))

    return System(step, state_nbytes)


def make_deepspeed(model: torch.nn.Module, options: argparse.Namespace) -> System:
    """Return DeepSpeed ZeRO-3 with offload."""
    import deepspeed

    host = {"device": "cpu"}
    settings = deepspeed_settings(
        options.batch, max_norm=MAX_NORM, zero={"stage": 3, "offload_optimizer": host, "offload_param": host}
    )
    deepspeed.init_distributed(dist_backend="gloo")
    engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

    def step(batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        return loss

    def state_nbytes() -> int:
        moments = [m for state in optimizer.state.values() for m in state.values() if isinstance(m, torch.Tensor)]
        working = [param.ds_tensor for param in model.parameters()]
        return sum(tensor.nbytes for tensor in (*working, *optimizer.fp32_partitioned_groups_flat, *moments))

    return System(step, state_nbytes)


MAKERS = {"torch": make_torch, "gemini": make_gemini, "fsdp2": make_fsdp2, "deepspeed": make_deepspeed}


def loopback_nbytes() -> int:
    """Return the bytes that have been sent over the loopback interface so far, by all of the machine's processes."""
    counters: int = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    return counters


def measure(system: System, options: argparse.Namespace) -> dict[str, Any]:
    """Train and return what one rank saw."""
    vocabulary = SHAPES[options.model].get("vocab_size", 50257)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    seconds, sent, losses = [], [], []
    for i in range(NUM_WARM_UPS + options.steps):
        if i == NUM_WARM_UPS:
            forget_peak()
        batch = torch.randint(0, vocabulary, (options.batch, options.seq), generator=generator)
        dist.barrier()
        start, sent_before = time.perf_counter(), loopback_nbytes()
        with profiled(options, is_on=i == NUM_WARM_UPS + options.steps - 1):
            losses.append(float(system.step(batch).detach()))
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        sent.append((loopback_nbytes() - sent_before) // dist.get_world_size())
    return {
        **spread_of(seconds[NUM_WARM_UPS:], "step_s"),
        **spread_of(sent[NUM_WARM_UPS:], "sent_bytes"),
        "state_bytes": system.state_nbytes(),
        "peak_rss_bytes": peak_resident_nbytes(),
        "pss_bytes": psutil.Process().memory_full_info().pss,
        "losses": losses,
    }


def profiled(options: argparse.Namespace, *, is_on: bool) -> AbstractContextManager[Any]:
    """Return a context that writes where rank 0 spends its time, if that was asked for."""
    if options.profile is None or not is_on or dist.get_rank() != 0:
        return nullcontext()

    def write(profile: torch.profiler.profile) -> None:
        table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=80)
        options.profile.write_text(table)

    return torch.profiler.profile(on_trace_ready=write)


def run_rank(rank: int, options: argparse.Namespace, directory: str) -> None:
    """Train one rank; rank 0 prints what all saw: its own times, and the largest memory of any."""
    world_size = options.ranks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(options.threads)
    store = dist.FileStore(f"{directory}/store", world_size)
    timeout = timedelta(seconds=GROUP_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    torch.manual_seed(0)
    model = build_model(options.model, options.seq, "cpu")
    params = sum(param.numel() for param in model.parameters())
    block_params = sum(param.numel() for param in model.transformer.h.parameters())  # type: ignore[union-attr]
    seen = measure(MAKERS[options.system.partition("-")[0]](model, options), options)
    everyone: list[dict[str, Any]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyone, seen)
    if rank == 0:
        largest = {
            name: max(other[name] for other in everyone) for name in ("state_bytes", "peak_rss_bytes", "pss_bytes")
        }
        losses = [sum(step) / world_size for step in zip(*(other["losses"] for other in everyone), strict=True)]
        print(
            json.dumps({"params": params, "block_params": block_params, **seen, **largest, "losses": losses}),
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that a run shares with zero_step.py."""
    parser.add_argument("--model", choices=SHAPES, default="gpt2")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a rank in a step")
    parser.add_argument("--seq", type=int, default=64, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")


def main() -> None:
    """Start the ranks and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--profile", type=Path, help="write a profile of rank 0's last step to this file")
    options = parser.parse_args()
    options.threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call]
            run_rank, args=(options, directory), nprocs=options.ranks
        )


if __name__ == "__main__":
    main()
