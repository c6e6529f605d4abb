"""Ranks that commit each step with a memory service, and go on from what other processes have left."""

from __future__ import annotations

from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fate import Fate, Fated
from patience import PATIENCE_S
from rank_cases import case_of, cut_batch, global_batches, sharded
from training_harness import hybrid_adam

from gemini.checkpoint.commit_and_recover import commit_step
from gemini.checkpoint.participants import Participants
from gemini.ranks.one_rank import ALONE

Outcome = tuple[int, list[float], dict[str, torch.Tensor]]
"""The step that a rank began with, its losses so far, and the weights."""


def go_on(
    *,
    model: str,
    end: int,
    num_steps: int,
    stage: int = 3,
    place: str = "host",
    directory: Path | None = None,
    frozen: str | None = None,
    parent: Connection | None = None,
    fate: Fate | None = None,
    ending: str | None = None,
    odd_rank: int = 0,
    closes: bool = False,
    **fields: Any,
) -> Outcome:
    """Train this rank's part up to a step, from where it was committed.

    Args:
        end: the step.
        num_steps: of the whole training, for its batches.
        parent: is told the step it begins after, and how many calls and returns training takes.
        fate: where it is killed; it trains on until then. For a rank with a parent.
        ending: how it ends, as if it were killed: "unpublished", all but the odd rank have published the last commit;
            "dropped", the odd rank has dropped it; "all dropped"; "dropped, unpublished", all but the odd rank have
            published another one after that.
        odd_rank: to which that happens.
        closes: whether what was committed is dropped in the end.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of(model, frozen=frozen)
    batches = global_batches(case, num_steps, world_size)
    fated = None if parent is None else Fated(fate, parent.send, parent.recv)
    with sharded(case, stage=stage, place=place, directory=directory, **fields) as engine:
        torch.manual_seed(2 + rank)
        optimizer = hybrid_adam(engine.parameters())
        first, losses = 0, []
        if engine.recovered is not None:
            first, losses = engine.recover().extra
        if fated is not None:
            parent.send(first)
            fated.begin()
        for step in range(first, end):
            loss = case.loss(engine(**cut_batch(batches[step], rank, world_size)))
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if ending == "unpublished" and step + 1 == end:
                if rank != odd_rank:
                    publish(engine, losses)
            elif engine.runtime.commits.file is not None:
                engine.commit(extra=[step + 1, losses])
            if fated is not None:
                fated.end_step()
        if fated is not None:
            parent.send(fated.end())
        if ending is not None and "dropped" in ending:
            engine.runtime.finish_updates()
            if rank == odd_rank or "all" in ending or "," in ending:
                engine.runtime.commits.drop()
            if rank != odd_rank and "," in ending:
                publish(engine, losses)
        weights = engine.master_state_dict() if ending is None else {}
        if not closes:
            engine.close(keep=True)
    return first, losses, weights


def publish(engine: Any, losses: list[float]) -> None:
    """Publish a commit that is not begun, as not all ranks have published it."""
    sharding, engine.runtime.sharding = engine.runtime.sharding, ALONE
    release, engine.runtime.updates.release = engine.runtime.updates.release, lambda sequence: None
    try:
        commit_step(engine.runtime, participants(engine), extra=[-1, losses])
    finally:
        engine.runtime.sharding, engine.runtime.updates.release = sharding, release


def participants(engine: Any) -> Any:
    return Participants(model=engine.module, buffers={}, optimizer=engine.runtime.coming.optimizer, scheduler=None)


def be_interrupted(*, model: str, directory: Path, **fields: Any) -> list[str]:
    """Interrupt a commit between what is published and what is heard of the others; return what came of two."""
    case = case_of(model)
    with sharded(case, stage=3, place="host", directory=directory, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        rank, world_size = dist.get_rank(), dist.get_world_size()
        case.loss(engine(**cut_batch(global_batches(case, 1, world_size)[0], rank, world_size))).backward()
        optimizer.step()
        group = engine.runtime.sharding.group
        gather = group.gather_values

        def interrupt(*args: Any, **kwargs: Any) -> Any:
            group.gather_values = gather
            gather(*args, **kwargs)
            raise KeyboardInterrupt

        group.gather_values = interrupt
        found = []
        for _ in range(2):
            try:
                engine.commit()
            except BaseException as error:
                found.append(f"{type(error).__name__}: {error}")
        return found


def serve_rank(rank: int, world_size: int, rendezvous: Path, parent: Connection, result: Path, case: Any) -> None:
    """Be a rank, in a process that may be killed; leave what came of it in a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(rendezvous), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=PATIENCE_S)
    )
    torch.save(go_on(parent=parent, **case), result)
    dist.destroy_process_group()
