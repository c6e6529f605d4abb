"""What ranks do in tests; importable in their processes, and the same in one process for comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from model_zoo import ZOO
from rank_models import RANK_CASES
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from training_harness import Case, config_for, hybrid_adam, same_bits

import zero
from gemini import GeminiDDP, HybridAdam, MemoryTier
from gemini.errors import GeminiError
from gemini.placement import plan
from zero.torch_group import TorchGroup


def cut_batch(batch: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Return a rank's rows of a global batch."""

    def rows(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        assert len(value) % world_size == 0
        return value.chunk(world_size)[rank]

    return {name: rows(value) for name, value in batch.items()}


def global_batches(case: Case, num_steps: int, num_parts: int) -> list[dict[str, Any]]:
    """Return batches that can be cut into a number of parts: as many of the case's own, one after the other."""
    parts = case.batches(num_steps * num_parts)
    joined = []
    for i in range(num_steps):
        group = parts[i * num_parts : (i + 1) * num_parts]
        joined.append(
            {
                name: torch.cat([part[name] for part in group]) if isinstance(value, torch.Tensor) else value
                for name, value in group[0].items()
            }
        )
    return joined


def case_of(model: str, *, frozen: str | None = None) -> Case:
    """Return a case of the zoo, or one for ranks; parameters whose name contains `frozen` are frozen."""
    case = {**ZOO, **RANK_CASES}[model]
    if frozen is None:
        return case

    def build() -> torch.nn.Module:
        made = case.build()
        for name, param in made.named_parameters():
            param.requires_grad_(frozen not in name)
        return made

    return dataclasses.replace(case, build=build)


def fit(
    engine: GeminiDDP,
    optimizer: HybridAdam,
    case: Case,
    batches: Iterable[dict[str, Any]],
    *,
    rank: int,
    world_size: int,
    num_micro: int = 1,
    no_sync: str | None = None,
) -> Fit:
    """Train on one rank's part of global batches; under `no_sync` "but-last" or "all" backward passes of a step."""
    losses, norms = [], []
    for batch in batches:
        loss_sum = 0.0
        for micro in range(num_micro):
            part = cut_batch(cut_batch(batch, micro, num_micro), rank, world_size)
            is_last = micro == num_micro - 1
            with engine.no_sync() if no_sync == "all" or (no_sync and not is_last) else nullcontext():
                loss = case.loss(engine(**part)) / num_micro
                loss.backward()
            loss_sum += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
        norms.append(optimizer.last_grad_norm)
    return Fit(losses, norms, engine.master_state_dict(), engine.runtime.steps.num_skipped_steps)


@dataclass(frozen=True)
class Fit:
    """What training gave one rank."""

    losses: list[float]
    """Its own."""
    norms: list[float | None]
    weights: dict[str, torch.Tensor]
    num_skipped: int


@cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """Return a mesh of all ranks; its process groups are made once in each process."""
    return init_device_mesh("cpu", sizes)


@contextmanager
def sharded(
    case: Case,
    *,
    stage: int,
    place: str,
    directory: Path | None,
    mesh: tuple[int, ...] | None = None,
    **fields: Any,
) -> Iterator[GeminiDDP]:
    """Yield this rank's engine."""
    config = config_for(place, directory, **fields)
    with zero.shard(case.model(), config, stage=stage, mesh=mesh_of(*mesh) if mesh else None) as engine:
        yield engine


def train_sharded(
    *,
    model: str,
    stage: int = 3,
    place: str = "host",
    directory: Path | None = None,
    num_steps: int = 3,
    num_micro: int = 1,
    no_sync: str | None = None,
    frozen: str | None = None,
    adam: dict[str, Any] | None = None,
    **fields: Any,
) -> Fit:
    """Train this rank's part."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of(model, frozen=frozen)
    batches = global_batches(case, num_steps, world_size * num_micro)
    with sharded(case, stage=stage, place=place, directory=directory, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters(), **(adam or {}))
        ranks = {"rank": rank, "world_size": world_size}
        return fit(engine, optimizer, case, batches, **ranks, num_micro=num_micro, no_sync=no_sync)


def train_in_pieces(*, piece_nbytes: int, **fields: Any) -> tuple[Fit, int]:
    """Train this rank's part with exchanges of at most so many bytes; return how many there were, too."""
    num_exchanges = 0
    start = TorchGroup.exchange

    def exchange(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_exchanges
        num_exchanges += 1
        return start(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "EXCHANGE_PIECE_NBYTES", piece_nbytes)
        patch.setattr(TorchGroup, "exchange", exchange)
        return train_sharded(**fields), num_exchanges


def train_alone(
    *,
    model: str,
    world_size: int,
    num_steps: int = 3,
    num_micro: int = 1,
    frozen: str | None = None,
    adam: dict[str, Any] | None = None,
    **fields: Any,
) -> Fit:
    """Train one process on the same batches, the ranks' parts one after the other.

    With a power of two of ranks the mean of the ranks' gradients and the sum of these, each divided, have equal bits.
    """
    case = case_of(model, frozen=frozen)
    batches = []
    for batch in global_batches(case, num_steps, world_size * num_micro):
        micros = [cut_batch(batch, micro, num_micro) for micro in range(num_micro)]
        batches += [[cut_batch(micro, rank, world_size) for micro in micros for rank in range(world_size)]]
    losses, norms = [], []
    with GeminiDDP(case.model(), config_for("host", **fields)) as engine:
        optimizer = hybrid_adam(engine.parameters(), **(adam or {}))
        for parts in batches:
            loss_sum = 0.0
            for part in parts:
                loss = case.loss(engine(**part)) / len(parts)
                loss.backward()
                loss_sum += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_sum)
            norms.append(optimizer.last_grad_norm)
        return Fit(losses, norms, engine.master_state_dict(), engine.runtime.steps.num_skipped_steps)


def overflow_on_last_rank(*, mesh: tuple[int, ...] | None = None, **fields: Any) -> dict[str, Any]:
    """Train three float16 steps; in the first the last rank's gradients overflow."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("gpt2")
    batches = [cut_batch(batch, rank, world_size) for batch in global_batches(case, 3, world_size)]
    with sharded(case, stage=3, place="device", directory=None, mesh=mesh, dtype=torch.float16, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        scaler = engine.runtime.coming.scaler
        assert scaler is not None
        scales, before = [scaler.scale], engine.master_state_dict()
        for i, batch in enumerate(batches):
            is_huge = i == 0 and rank == world_size - 1
            (case.loss(engine(**batch)) * (1e30 if is_huge else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scales.append(scaler.scale)
            if i == 0:
                kept_weights = same_bits(engine.master_state_dict(), before)
        return {
            "num_skipped": engine.runtime.steps.num_skipped_steps,
            "scales": scales[:3],
            "kept_weights": kept_weights,
            "weights": engine.master_state_dict(),
        }


def save_and_load(
    *, stage: int, place: str, directory: Path | None, mesh: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Train two steps, save, train one more; load what was saved into a new engine and train that step again."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("gpt2")
    batches = global_batches(case, 3, world_size)

    def go_on(engine: GeminiDDP, optimizer: HybridAdam, part: slice) -> Fit:
        return fit(engine, optimizer, case, batches[part], rank=rank, world_size=world_size)

    with sharded(case, stage=stage, place=place, directory=directory, mesh=mesh) as engine:
        optimizer = hybrid_adam(engine.parameters())
        go_on(engine, optimizer, slice(2))
        saved = {"model": engine.master_state_dict(), "optimizer": optimizer.state_dict()}
        through = go_on(engine, optimizer, slice(2, 3))
    with sharded(case, stage=stage, place=place, directory=directory, mesh=mesh) as engine:
        optimizer = hybrid_adam(engine.parameters())
        go_on(engine, optimizer, slice(1))  # to be overwritten
        engine.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        again = go_on(engine, optimizer, slice(2, 3))
        working = engine.state_dict()
    return {"saved": saved, "through": through.weights, "again": again.weights, "working": working}


def save_checkpoint(
    *,
    stage: int,
    place: str,
    directory: Path,
    swap: Path | None = None,
    wait: bool = True,
    frozen: str | None = None,
    **fields: Any,
) -> Fit:
    """Train two steps, save a checkpoint, train one more; return what that gave."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("gpt2", frozen=frozen)
    batches = global_batches(case, 3, 12)
    with sharded(case, stage=stage, place=place, directory=swap, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        fit(engine, optimizer, case, batches[:2], rank=rank, world_size=world_size)
        engine.save_checkpoint(directory, extra={"seen": 2}, wait=wait)
        return fit(engine, optimizer, case, batches[2:], rank=rank, world_size=world_size)


def resume_checkpoint(
    *,
    stage: int,
    place: str,
    directory: Path,
    swap: Path | None = None,
    frozen: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return what a fresh engine of other first values holds after loading a checkpoint, and after one more step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("gpt2", frozen=frozen)
    with sharded(case, stage=stage, place=place, directory=swap, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        engine.load_state_dict({name: value + 1 for name, value in engine.master_state_dict().items()})
        found = engine.load_checkpoint(directory)
        loaded = {"model": engine.master_state_dict(), "optimizer": optimizer.state_dict()["state"]}
        last = global_batches(case, 3, 12)[2:]
        through = fit(engine, optimizer, case, last, rank=rank, world_size=world_size)
    return {"step": found.step, "extra": found.extra, "loaded": loaded, "through": through}


def keep_buffers(*, directory: Path) -> tuple[bool, bool]:
    """Save and load buffers that differ among ranks; return whether this rank's came back, in a new engine."""
    case = case_of("conv_net")
    with sharded(case, stage=3, place="host", directory=None) as engine:
        batches = global_batches(case, 1, dist.get_world_size())
        fit(engine, hybrid_adam(engine.parameters()), case, batches, rank=dist.get_rank(), world_size=2)
        expected = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        engine.save_checkpoint(directory)
    with sharded(case, stage=3, place="host", directory=None) as engine:
        hybrid_adam(engine.parameters())
        engine.load_checkpoint(directory)
        is_same = same_bits(dict(engine.module.named_buffers()), expected)
    mean = next(value for name, value in expected.items() if name.endswith("running_mean"))
    means = [torch.empty_like(mean) for _ in range(2)]
    dist.all_gather(means, mean)
    return is_same, torch.equal(*means)


def evaluate_between_steps(*, stage: int, place: str) -> list[float]:
    """Return the losses of a training in which each step is followed by an evaluation, which count too."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("gpt2")
    batches = [cut_batch(batch, rank, world_size) for batch in global_batches(case, 3, world_size)]
    losses = []
    with sharded(case, stage=stage, place=place, directory=None) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for batch in batches:
            case.loss(engine(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.eval()
            with torch.no_grad():
                losses.append(case.loss(engine(**batches[0])).item())
            engine.train()
        engine.eval()
        tokens = engine.module.generate(batches[0]["input_ids"][:1, :4], max_new_tokens=4, do_sample=False)
    return [*losses, *tokens[0].tolist()]


def measure_memory(
    *, model: str, stage: int, place: str, directory: Path | None, mesh: tuple[int, ...] | None = None, **fields: Any
) -> dict[str, Any]:
    """Train two steps; return bytes planned and held by tier and purpose, and bytes fetched."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of(model)
    with sharded(case, stage=stage, place=place, directory=directory, mesh=mesh, **fields) as engine:
        optimizer = hybrid_adam(engine.parameters())
        batches = global_batches(case, 2, world_size)
        fit(engine, optimizer, case, batches, rank=rank, world_size=world_size)
        runtime = engine.runtime
        ledger = runtime.resources.ledger
        return {
            "planned": runtime.demand.by_purpose,
            "held": {tier: ledger.by_purpose(tier) for tier in MemoryTier},
            "peak": {tier: ledger.peak_nbytes(tier) for tier in MemoryTier},
            "numels": [(chunk.numel, chunk.unit_id == 0) for chunk in runtime.layout.chunks],
            "fetched_nbytes": runtime.core.stats.fetched_nbytes,
        }


def differ_from_others(*, how: str) -> tuple[str, bool]:
    """Do something that the last rank does otherwise; return the error's type and message, and whether weights stay."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_last = rank == world_size - 1
    case = case_of("tower")
    with sharded(case, stage=3, place="host", directory=None) as engine:
        optimizer = hybrid_adam(engine.parameters())
        batches = global_batches(case, 2, world_size)
        fit(engine, optimizer, case, batches[:1], rank=rank, world_size=world_size)
        weights, state = engine.master_state_dict(), optimizer.state_dict()
        try:
            if how == "lr":
                optimizer.param_groups[0]["lr"] *= 2 if is_last else 1
                fit(engine, optimizer, case, batches[1:], rank=rank, world_size=world_size)
            elif how == "optimizer":
                state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][: 1 if is_last else None]
                optimizer.load_state_dict(state)
            else:
                zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
                first = next(iter(zeros))
                if is_last and how == "names":
                    del zeros[first]
                elif is_last:
                    zeros[first] = zeros[first][:1]
                engine.load_state_dict(zeros, strict=how != "names")
        except GeminiError as error:
            return f"{type(error).__name__}: {error}", same_bits(engine.master_state_dict(), weights)
    return "no error", False


def count_gathers_of_words(*, place: str) -> list[int]:
    """Return how often each of three steps gathers the embedding."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("reader")
    with sharded(case, stage=3, place=place, directory=None) as engine:
        optimizer = hybrid_adam(engine.parameters())
        runtime = engine.runtime
        words = runtime.core.chunks[runtime.layout.place_by_name["words.weight"].chunk_id].spec.name
        counts = []
        for batch in global_batches(case, 3, world_size):
            with gathered_names(engine) as names:
                case.loss(engine(**cut_batch(batch, rank, world_size))).backward()
                optimizer.step()
                optimizer.zero_grad()
            counts.append(names.count(words))
        return counts


@contextmanager
def gathered_names(engine: GeminiDDP) -> Iterator[list[str]]:
    """Yield what has been gathered inside, one entry for each all-gather of weights."""
    group, names = engine.runtime.sharding.group, []
    inner = group.all_gather

    def noted(whole: torch.Tensor, *, name: str, **fields: Any) -> Any:
        names.append(name)
        return inner(whole, name=name, **fields)

    group.all_gather = noted
    yield names
    del group.all_gather


def count_collectives(*, stage: int, num_micro: int, mesh: tuple[int, ...] | None = None) -> tuple[dict[str, int], int]:
    """Return how often one step agrees and exchanges, and the number of chunks that are trained."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    case = case_of("tower")
    counts = {"gather_values": 0, "exchange": 0}

    def count(group: Any, method: str) -> None:
        inner = getattr(group, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[method] += 1
            return inner(*args, **kwargs)

        setattr(group, method, counted)

    with sharded(case, stage=stage, place="device", directory=None, mesh=mesh) as engine:
        optimizer = hybrid_adam(engine.parameters())
        for method in counts:
            count(engine.runtime.sharding.group, method)
        for batch in global_batches(case, num_micro, world_size):
            case.loss(engine(**cut_batch(batch, rank, world_size))).backward()
        optimizer.step()
        return counts, len(engine.runtime.states)
