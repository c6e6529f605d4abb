"""What ranks do whose gradients meet in host memory."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from frozen_cases import seals_of_shared_files, shared_mappings
from rank_cases import Fit, case_of, cut_batch, fit, global_batches, train_sharded
from training_harness import config_for, hybrid_adam

import zero
from gemini import CollectiveError, GeminiConfig, GeminiDDP
from gemini.gradients.part_sums import CollectiveSums
from gemini.offload.resources import budgets_of, open_resources
from gemini.ranks.sharding import PartSums, Sharding, SharedHomes
from zero import host_sums
from zero.host_meeting import choose_host_memory
from zero.host_pages import RankPage
from zero.torch_group import TorchGroup

SLOT_NBYTES = 1 << 20


@contextmanager
def opened_sums(exchange: str, *, place: str = "host") -> Iterator[PartSums]:
    """Yield sums of two slots over all ranks."""
    config = config_for(place, exchange=exchange)
    group = TorchGroup(None, torch.device("cpu"))
    resources = open_resources(config, budgets_of(config), disk_nbytes=0)
    sums: PartSums
    homes: SharedHomes | None = None
    if exchange == "host":
        meeting = choose_host_memory(config, group.ranks, group)
        assert meeting is not None
        sums, homes = meeting.open(resources, num_slots=2, slot_nbytes=SLOT_NBYTES, homes_nbytes=0)
        dist.barrier()
        meeting.seal()
        meeting.close()
    else:
        sums = CollectiveSums(group, resources.transfers, num_slots=2, slot_nbytes=SLOT_NBYTES)
    try:
        yield sums
        dist.barrier()
    finally:
        sums.close()
        if homes is not None:
            homes.close()
        resources.close()


def parts_of(rank: int, numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return what a rank has for each, [world size, numel]."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    scale = 10.0 ** torch.randint(-4, 3, (dist.get_world_size(), numel), generator=generator)
    return (torch.randn(dist.get_world_size(), numel, generator=generator) * scale).to(dtype)


def add_up(
    *, numels: list[int], dtype: torch.dtype, exchange: str = "host", place: str = "host", is_total: bool = False
) -> list[torch.Tensor]:
    """Return this rank's sums, one after another, with two under way."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found, under_way = [], []
    with opened_sums(exchange, place=place) as sums:
        for number, numel in enumerate(numels):
            if len(under_way) == 2:
                found.append(under_way.pop(0).wait())
            slot = sums.slots[number % 2].view(dtype)[: world_size * numel]
            slot.copy_(parts_of(rank, numel, dtype, number).reshape(-1))
            divisor = None if is_total else world_size
            under_way.append(sums.start(number % 2, numel=numel, dtype=dtype, divisor=divisor, name=f"sum {number}"))
        found += [pending.wait() for pending in under_way]
    return found


def add_up_plainly(*, numels: list[int], dtype: torch.dtype, is_total: bool = False) -> list[torch.Tensor]:
    """Return the same by plain torch, in the order of ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for number, numel in enumerate(numels):
        total = torch.zeros(numel) if world_size == 0 else parts_of(0, numel, dtype, number)[rank].float()
        for other in range(1, world_size):
            total = total + parts_of(other, numel, dtype, number)[rank].float()
        found.append(total if is_total else (total / world_size).to(dtype))
    return found


def wait_elsewhere_while_others_add() -> list[float]:
    """Have the first rank wait for the others in a collective that these enter only when they have their sums."""
    with opened_sums("host") as sums:
        sums.slots[0].view(torch.float32)[: 4 * dist.get_world_size()].fill_(dist.get_rank() + 1)
        pending = sums.start(0, numel=4, dtype=torch.float32, divisor=None, name="four")
        if dist.get_rank() == 0:
            dist.barrier()
            return pending.wait().tolist()
        found = pending.wait().tolist()
        dist.barrier()
        return found


def train_alone_in_a_group(*, exchange: str, place: str, stage: int) -> Fit:
    """Train in a group of one rank, which exchanges with itself."""
    case, config = case_of("tower"), config_for(place, exchange=exchange)
    group = TorchGroup(None, torch.device("cpu"))
    meeting = choose_host_memory(config, group.ranks, group)
    assert (meeting is not None) is (exchange == "host")
    sharding = Sharding(group=group, node_ranks=(0,), stage=stage, host_memory=meeting)
    with GeminiDDP(case.model(), config, sharding=sharding) as engine:
        if meeting is not None:
            meeting.close()
        optimizer = hybrid_adam(engine.parameters())
        return fit(engine, optimizer, case, global_batches(case, 3, 1), rank=0, world_size=1)


def count_what_is_left(**fields: Any) -> dict[str, Any]:
    """Train; return what of shared memory there is during and after."""
    gc.collect()
    train_sharded(num_steps=1, **fields)  # process groups and threads stay for the next engine
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))
    case = case_of(fields["model"])
    seals, num_mapped = [], 0
    with zero.shard(case.model(), config_for("host", exchange="host")) as engine:
        batch = cut_batch(global_batches(case, 1, dist.get_world_size())[0], dist.get_rank(), dist.get_world_size())
        case.loss(engine(**batch)).backward()
        seals, num_mapped = seals_of_shared_files(), len(shared_mappings())
        dist.barrier()
        del batch
    del engine
    gc.collect()
    after = len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm"))
    num_left = len(shared_mappings())
    return {"before": before, "after": after, "seals": seals, "num_mapped": num_mapped, "num_left": num_left}


def train_until_killed(*, where: str, place: str = "host") -> dict[str, Any]:
    """Train; in the second step the last rank is killed in the middle of an exchange or a gather.

    Args:
        where: the rank's words on its page before which it is killed, such as "publish" or "take"; "add": in the thread
            that adds up.
        place: where weights live.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case, is_armed, num_calls = case_of("tower"), False, 0

    def striking(inner: Callable[..., Any]) -> Callable[..., Any]:
        def strike(*args: Any) -> Any:
            nonlocal num_calls
            num_calls += is_armed
            if rank == world_size - 1 and num_calls == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args)

        return strike

    with pytest.MonkeyPatch.context() as patch:
        if where == "add":
            patch.setattr(host_sums, "_await_slot", striking(host_sums._await_slot))
        else:
            patch.setattr(RankPage, where, striking(getattr(RankPage, where)))
        message = ""
        with zero.shard(case.model(), config_for(place, exchange="host"), stage=3) as engine:
            optimizer = hybrid_adam(engine.parameters())
            try:
                for step, batch in enumerate(global_batches(case, 4, world_size)):
                    is_armed = step == 1
                    case.loss(engine(**cut_batch(batch, rank, world_size))).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            except CollectiveError as error:
                message = str(error)
        del engine, optimizer
    gc.collect()
    return {"message": message, "num_left": len(shared_mappings()), "shm": sorted(os.listdir("/dev/shm"))}


def ask_for_different_sums() -> None:
    """Have the last rank start a sum under another name than the others."""
    with opened_sums("host") as sums:
        is_last = dist.get_rank() == dist.get_world_size() - 1
        sums.start(0, numel=4, dtype=torch.float32, divisor=None, name="other" if is_last else "one").wait()


def shard_on_machines(*, machines: list[str], mesh: tuple[int, ...] | None = None, **fields: Any) -> Any:
    """Train as if ranks ran on several machines, of which these are the names, by rank."""
    inner = socket.gethostname
    socket.gethostname = lambda: machines[dist.get_rank()]
    try:
        return train_sharded(model="tower", mesh=mesh, **fields)
    finally:
        socket.gethostname = inner


def choose_as_if_on_gpus(*, unreachable: list[tuple[int, int]], hidden: bool = False, machines: int = 1) -> bool:
    """Return whether ranks that each had a GPU would meet in host memory by themselves.

    Args:
        unreachable: pairs of GPUs of which the first cannot reach the second's memory.
        hidden: whether each rank sees its own GPU alone.
        machines: how many there are, with as many ranks each.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numbers = [rank] if hidden else list(range(world_size))
    group = TorchGroup(None, torch.device("cpu"))
    group.device = torch.device("cuda", numbers.index(rank))

    def can_access(own: int, other: int) -> bool:
        return (numbers[own], numbers[other]) not in unreachable

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: len(numbers))
        patch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{numbers[i]}"))
        patch.setattr(torch.cuda, "can_device_access_peer", can_access)
        num_near = world_size // machines
        node_ranks = range(rank // num_near * num_near, (rank // num_near + 1) * num_near)
        meeting = choose_host_memory(GeminiConfig(), node_ranks, group)
    if meeting is not None:
        meeting.close()
    return meeting is not None


def shard_without_memory_files(**fields: Any) -> None:
    """Build an engine while the first rank cannot make memory files."""
    inner = os.memfd_create
    if dist.get_rank() == 0:

        def refuse(*_: Any) -> int:
            raise OSError(38, "Function not implemented")

        os.memfd_create = refuse
    try:
        train_sharded(model="tower", num_steps=1, **fields)
    finally:
        os.memfd_create = inner


def has_host_memory(*, directory: Path | None = None, **fields: Any) -> bool:
    """Return whether an engine's gradients meet in host memory."""
    with zero.shard(case_of("tower").model(), config_for("host", directory, **fields)) as engine:
        return engine.runtime.sharding.host_memory is not None
