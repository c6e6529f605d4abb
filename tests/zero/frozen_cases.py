"""What ranks do with frozen weights that they share."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import case_of, cut_batch, gathered_names, global_batches, sharded
from training_harness import config_for, hybrid_adam

import zero
from gemini import CollectiveError, GeminiDDP, MemoryTier
from zero.own_groups import line_of

MODEL = "adapted"
FROZEN = "blocks.1.base.0.weight"


def shared_mappings() -> list[list[str]]:
    """Return the kernel's description of each mapping of a memory file in this process."""
    entries: list[list[str]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            entries.append([])
        entries[-1].append(line)
    return [entry for entry in entries if "/memfd:gemini" in entry[0]]


def nbytes_of(field: str) -> int:
    """Return a count of this process's mappings of memory files."""
    lines = [line for entry in shared_mappings() for line in entry]
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def seals_of_shared_files() -> list[int]:
    """Return the seals of each memory file that this process has a descriptor of."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
    names = {number: os.readlink(f"/proc/self/fd/{number}") for number in numbers}
    return [fcntl.fcntl(number, fcntl.F_GET_SEALS) for number, name in names.items() if "/memfd:gemini" in name]


def train_two_steps(engine: GeminiDDP) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizer = hybrid_adam(engine.parameters())
    for batch in global_batches(case_of(MODEL), 2, world_size):
        case_of(MODEL).loss(engine(**cut_batch(batch, rank, world_size))).backward()
        optimizer.step()
        optimizer.zero_grad()


def measure_sharing(*, stage: int, place: str, directory: Path | None = None, **fields: Any) -> dict[str, Any]:
    """Train two steps; return what was gathered and what the frozen weights take."""
    gc.collect()  # engines of tests before, whose last exception refers to them
    line_of(dist.group.WORLD)  # process groups of the engine's own stay for the next one
    num_descriptors = len(os.listdir("/proc/self/fd"))
    with sharded(case_of(MODEL), stage=stage, place=place, directory=directory, **fields) as engine:
        with gathered_names(engine) as names:
            train_two_steps(engine)
        runtime = engine.runtime
        dist.barrier()  # all have touched their mappings, and none has closed
        result = {
            "gathered": names,
            "pss_nbytes": nbytes_of("Pss"),
            "dirtied_nbytes": nbytes_of("Anonymous"),
            "inodes": {entry[0].split()[4] for entry in shared_mappings()},
            "seals": seals_of_shared_files(),
            "frozen_nbytes": sum(4 * chunk.numel for chunk in runtime.layout.chunks if not chunk.is_trainable),
            "whole_nbytes": sum(demand.compute_nbytes for demand in runtime.demands if not demand.is_trainable),
            "planned": runtime.demand.by_purpose,
            "held": {tier: runtime.resources.ledger.by_purpose(tier) for tier in MemoryTier},
            "num_resident": engine.memory_report().num_resident_chunks,
        }
        dist.barrier()
    result["num_left"] = len(shared_mappings())
    result["num_new_descriptors"] = len(os.listdir("/proc/self/fd")) - num_descriptors
    return result


def overwrite_and_restore() -> dict[str, Any]:
    """Let all ranks overwrite a frozen weight, and load the old one again; return what each sees."""
    with sharded(case_of(MODEL), stage=3, place="host", directory=None) as engine:
        weight = engine.get_parameter(f"module.{FROZEN}")
        saved = engine.state_dict()
        weight.data.fill_(7.0)
        seen = engine.state_dict()[FROZEN]
        engine.load_state_dict(saved)
        return {"saved": saved[FROZEN], "seen": seen, "restored": weight.data.clone()}


def load_and_read(*, stage: int, place: str) -> dict[str, Any]:
    """Train, and load other weights, of the frozen ones only rank 0 the right ones; return what all see then."""
    case = case_of(MODEL)
    batch = cut_batch(global_batches(case, 1, dist.get_world_size())[0], 0, dist.get_world_size())
    other = case.model(seed=5)
    with sharded(case, stage=stage, place=place, directory=None) as engine:
        train_two_steps(engine)
        given = other.state_dict()
        if dist.get_rank() > 0:
            given |= {name: torch.zeros_like(value) for name, value in given.items() if "base" in name}
        engine.load_state_dict(given)
        with torch.no_grad():
            output = engine(**batch)
        result = {"loaded": other.state_dict(), "read": engine.state_dict(), "dirtied_nbytes": nbytes_of("Anonymous")}
        return result | {"same_output": torch.equal(output, other(**batch))}


def read_first_values(*, share_frozen: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Build an engine from the meta device; return its weights, and how many parameters were given values here."""
    with torch.device("meta"):
        model = case_of(MODEL).model()
    num_filled = 0

    def fill(module: torch.nn.Module) -> None:
        nonlocal num_filled
        num_filled += 1
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    with zero.shard(model, config_for("host", share_frozen=share_frozen), init_fn=fill) as engine:
        return engine.state_dict(), num_filled


def train_while_the_first_rank_dies() -> dict[str, Any]:
    """Train on frozen weights of which the rank that made their file dies; return how the others end."""
    case = case_of(MODEL)
    model = case.model()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    num_runs = 0

    def strike(*_: Any) -> None:
        nonlocal num_runs
        num_runs += 1
        if rank == 0 and num_runs == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    model.blocks[2].register_forward_pre_hook(strike)
    message = ""
    with zero.shard(model, config_for("host"), stage=3) as engine:
        num_mapped = len(shared_mappings())
        batch = cut_batch(global_batches(case, 1, world_size)[0], rank, world_size)
        try:
            for _ in range(3):
                case.loss(engine(**batch)).backward()
        except CollectiveError as error:
            message = str(error)
        with torch._C.DisableTorchFunctionSubclass():  # the engine itself refuses to be used any more
            frozen = engine.get_parameter(f"module.{FROZEN}").detach().clone()
    return {"message": message, "num_mapped": num_mapped, "num_left": len(shared_mappings()), "frozen": frozen}


def measure_on_machines(*, machines: list[str]) -> dict[str, Any]:
    """Measure as if ranks ran on several machines, of which these are the names, by rank."""
    inner = socket.gethostname
    socket.gethostname = lambda: machines[dist.get_rank()]
    try:
        return measure_sharing(stage=3, place="host")
    finally:
        socket.gethostname = inner


def shard_with_a_hidden_file() -> dict[str, Any]:
    """Build an engine while other ranks cannot open the first one's files; return how it keeps frozen weights."""
    inner = os.memfd_create
    if dist.get_rank() == 0:

        def refuse(*_: Any) -> int:
            raise OSError(38, "Function not implemented")

        os.memfd_create = refuse
    try:
        return measure_sharing(stage=3, place="host")
    finally:
        os.memfd_create = inner
