"""What ranks do whose weights are read where they live."""

from __future__ import annotations

import gc
import threading
from typing import Any

import async_device
import pytest
import torch
import torch.distributed as dist
from frozen_cases import nbytes_of
from patience import PATIENCE_S
from rank_cases import Fit, case_of, cut_batch, fit, gathered_names, global_batches, sharded
from training_harness import config_for, hybrid_adam

import zero
from gemini import GeminiDDP
from gemini.offload.resources import budgets_of, open_resources
from gemini.tiers import MemoryTier
from zero import host_weights
from zero.host_meeting import choose_host_memory
from zero.host_pages import RankPage
from zero.torch_group import TorchGroup

NBYTES = 3 * 4096


class OpenHomes:
    """Homes of two chunks on each rank, and what they are in."""

    def __init__(self, place: str) -> None:
        config = config_for(place, exchange="host")
        group = TorchGroup(None, torch.device("cpu"))
        self.resources = open_resources(config, budgets_of(config), disk_nbytes=0)
        meeting = choose_host_memory(config, group.ranks, group)
        assert meeting is not None
        self.sums, self.homes = meeting.open(self.resources, num_slots=2, slot_nbytes=4096, homes_nbytes=2 * NBYTES)
        arena = self.resources.arena
        self.own = [arena.allocate(NBYTES, "working", source=self.homes.claim(chunk, NBYTES)) for chunk in range(2)]
        dist.barrier()
        meeting.seal()
        meeting.close()

    def slot(self) -> torch.Tensor:
        return torch.zeros(dist.get_world_size() * NBYTES, dtype=torch.uint8)

    def close(self) -> None:
        dist.barrier()
        self.sums.close()
        self.homes.close()
        self.resources.close()


def gather_what_changes(*, num_rounds: int, place: str = "host") -> list[list[int]]:
    """Write both homes and gather them again and again; return what was found in each round, by chunk and rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    opened, found = OpenHomes(place), []
    slots = [opened.slot(), opened.slot()]
    for number in range(num_rounds):
        pending = []
        for chunk in range(2):
            opened.homes.readers_of(chunk).wait()
            opened.own[chunk].fill_((3 * number + chunk + rank) % 251)
            own = slots[chunk].view(world_size, NBYTES)[rank]
            own.copy_(opened.own[chunk])
            pending.append(opened.homes.gather(chunk, slots[chunk], name=f"chunk {chunk}"))
        row = []
        for chunk, gathering in enumerate(pending):
            gathering.wait()
            for part in slots[chunk].view(world_size, NBYTES):
                values = part.unique().tolist()
                row.append(values[0] if len(values) == 1 else -1)
        found.append(row)
    opened.close()
    return found


def write_while_another_reads() -> tuple[bool, bool]:
    """Return whether the first rank may write a home that the last one reads, and whether it may afterwards."""
    is_first, is_last = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1
    inner, may_end = RankPage.note_read, threading.Event()

    def note_read(page: RankPage, number: int) -> None:
        if is_last:
            may_end.wait(PATIENCE_S)
        inner(page, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankPage, "note_read", note_read)
        opened = OpenHomes("host")
        slot = opened.slot()
        opened.homes.gather(0, slot, name="chunk 0").wait()
        dist.barrier()
        outcome = (True, True)
        writer = threading.Thread(target=opened.homes.readers_of(0).wait)
        if is_first:
            opened.homes.readers_of(1).wait()  # which nobody has gathered
            writer.start()
            writer.join(0.2)
            outcome = (not writer.is_alive(), False)
        dist.barrier()
        may_end.set()
        if is_first:
            writer.join(PATIENCE_S)
            outcome = (outcome[0], not writer.is_alive())
        opened.close()
        del slot
    return outcome


def measure_weights(*, stage: int, place: str, directory: Any = None, **fields: Any) -> dict[str, Any]:
    """Train two steps; return which weights were gathered by collectives, and bytes."""
    gc.collect()  # what tests before had mapped
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case, num_copied = case_of("tower"), 0
    inner = host_weights._copy

    def counting(*args: Any) -> None:
        nonlocal num_copied
        num_copied += 1
        inner(*args)

    with (
        pytest.MonkeyPatch.context() as patch,
        sharded(case, stage=stage, place=place, directory=directory, **fields) as engine,
    ):
        patch.setattr(host_weights, "_copy", counting)
        optimizer = hybrid_adam(engine.parameters())
        with gathered_names(engine) as names:
            fit(engine, optimizer, case, global_batches(case, 2, world_size), rank=rank, world_size=world_size)
        dist.barrier()
        runtime = engine.runtime
        result = {
            "gathered": names,
            "num_copied": num_copied,
            "pss_nbytes": nbytes_of("Pss"),
            "planned": runtime.demand.by_purpose,
            "held": {tier: runtime.resources.ledger.by_purpose(tier) for tier in MemoryTier},
            "whole_nbytes": sum(demand.compute_nbytes for demand in runtime.demands),
        }
        dist.barrier()
        return result


def train_on_async_device(*, num_parts: int, stage: int | None, options: dict[str, int], **fields: Any) -> Fit:
    """Train on the simulated asynchronous device, where gloo carries nothing.

    Args:
        num_parts: of each batch; with a stage as many as there are ranks.
        stage: None: one process takes one part after another, without ranks.
        options: of the device.
        **fields: of the configuration.
    """
    async_device.load()
    case, losses, norms = case_of("gpt2"), [], []
    own_parts = range(num_parts) if stage is None else [dist.get_rank()]
    config = config_for("device", None, device=async_device.NAME, **fields)
    with (
        async_device.device_with(fills_new_blocks=1, **options) as device,
        GeminiDDP(case.model(), config) if stage is None else zero.shard(case.model(), config, stage=stage) as engine,
    ):
        optimizer = hybrid_adam(engine.parameters())
        for batch in global_batches(case, 4, num_parts):
            for part in own_parts:
                given = {name: value.to(device) for name, value in cut_batch(batch, part, num_parts).items()}
                loss = case.loss(engine(**given)) / len(own_parts)
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            norms.append(optimizer.last_grad_norm)
        values = [loss.item() for loss in losses]
        return Fit(values, norms, engine.master_state_dict(), engine.runtime.steps.num_skipped_steps)


def write_in_place_between_steps(*, exchange: str, place: str, stage: int, **fields: Any) -> dict[str, torch.Tensor]:
    """Train; after each step halve a weight in place, and read others; return all weights."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("tower")
    with sharded(case, stage=stage, place=place, directory=None, exchange=exchange, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        params = dict(engine.module.named_parameters())
        for batch in global_batches(case, 3, world_size):
            case.loss(engine(**cut_batch(batch, rank, world_size))).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for param in params.values():
                    param.mul_(0.5)
                    param.mul_(1.5)
                assert all(bool(param.isfinite().all()) for param in params.values())
            with torch.no_grad():
                engine(**cut_batch(batch, rank, world_size))
        state = engine.state_dict()
        engine.load_state_dict({name: value * 2 for name, value in state.items()})
        return {name: value.clone() for name, value in engine.state_dict().items()}
