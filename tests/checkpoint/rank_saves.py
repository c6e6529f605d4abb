"""Ranks that save and load together, while something fails on one of them; importable in their processes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rank_cases import case_of, cut_batch, fit, global_batches, sharded
from training_harness import hybrid_adam

from gemini import GeminiError


def outcome_of(action: Callable[[], Any]) -> tuple[str, str]:
    """Return the type and text of what an action raises."""
    try:
        action()
    except GeminiError as error:
        return type(error).__name__, str(error)
    return "", ""


def save_with_fault(*, directory: Path, fault: str, failing_rank: int, wait: bool) -> dict[str, Any]:
    """Train a step, save while something fails on one rank, train another and save again.

    Args:
        directory: for the checkpoints.
        fault: "full": its drive is; "extra": what it is given cannot be kept.
        failing_rank: which rank.
        wait: whether the save is waited for, or noticed by the next step.

    Returns:
        What the save and the next step raised, and the run beside one without a fault.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_failing = rank == failing_rank
    case = case_of("gpt2")
    batches = global_batches(case, 2, world_size)
    with sharded(case, stage=3, place="host", directory=None) as engine:
        optimizer = hybrid_adam(engine.parameters(), max_grad_norm=0.1)
        place = {"rank": rank, "world_size": world_size}
        fit(engine, optimizer, case, batches[:1], **place)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if is_failing and fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        extra = object() if is_failing and fault == "extra" else None
        saved = outcome_of(lambda: engine.save_checkpoint(directory, extra=extra, wait=wait))
        resumed = fit_noting(engine, optimizer, case, batches[1], **place)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        weights = engine.master_state_dict()
        left = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
        dist.barrier()
        engine.save_checkpoint(directory)
    with sharded(case, stage=3, place="host", directory=None) as engine:
        straight = fit(engine, hybrid_adam(engine.parameters(), max_grad_norm=0.1), case, batches, **place)
    return {"saved": saved, "stepped": resumed, "weights": weights, "expected": straight.weights, "left": left}


def fit_noting(engine: Any, optimizer: Any, case: Any, batch: Any, **place: int) -> tuple[str, str]:
    """Train a step whose update is tried again if it fails; return what the first try raised."""
    case.loss(engine(**cut_batch(batch, place["rank"], place["world_size"]))).backward()
    outcome = outcome_of(optimizer.step)
    if outcome[0]:
        optimizer.step()
    optimizer.zero_grad()
    return outcome


def save_and_damage(*, directory: Path, damaged: str) -> dict[str, Any]:
    """Save, damage a file, load; return what loading raises, and whether weights changed."""
    case = case_of("gpt2")
    with sharded(case, stage=3, place="host", directory=None) as engine:
        optimizer = hybrid_adam(engine.parameters())
        path = engine.save_checkpoint(directory, optimizer=optimizer).wait()
        if dist.get_rank() == 0:
            data = bytearray((path / damaged).read_bytes())
            data[-100] ^= 1
            (path / damaged).write_bytes(data)
        dist.barrier()
        before = engine.master_state_dict()
        loaded = outcome_of(lambda: engine.load_checkpoint(directory))
        after = engine.master_state_dict()
    return {"loaded": loaded, "before": before, "after": after}


def load_apart(*, directory: Path) -> tuple[str, str]:
    """Let each rank load a checkpoint of its own."""
    case = case_of("tower")
    with sharded(case, stage=3, place="host", directory=None) as engine:
        optimizer = hybrid_adam(engine.parameters())
        first = engine.save_checkpoint(directory, optimizer=optimizer).wait()
        batches = global_batches(case, 1, dist.get_world_size())
        fit(engine, optimizer, case, batches, rank=dist.get_rank(), world_size=dist.get_world_size())
        second = engine.save_checkpoint(directory).wait()
        return outcome_of(lambda: engine.load_checkpoint((first, second)[dist.get_rank() % 2]))


def save_apart(*, directory: Path) -> tuple[str, str]:
    """Let each rank save into a directory of its own, in which an earlier save was interrupted."""
    own = directory / str(dist.get_rank())
    (own / ".saving").mkdir(parents=True)
    with sharded(case_of("tower"), stage=3, place="host", directory=None) as engine:
        return outcome_of(lambda: engine.save_checkpoint(own))
