"""Records one engine: describes it, gives the recorder to all its parts, and follows the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gemini.errors import ConfigError
from gemini.heap import statistics
from gemini.kernels.spans import SpanSource
from gemini.offload.home import TiledHome
from gemini.offload.io import IoStats
from gemini.offload.transfer import StreamTransfers
from gemini.placement.cost_model import StepPrediction
from gemini.profile.description import ChunkDescription, Prediction, RunDescription, TierDescription
from gemini.profile.events import MemorySample, Step
from gemini.profile.recorder import Recorder
from gemini.profile.recording import RecordingWriter
from gemini.runtime.runtime import Runtime
from gemini.tiers import MemoryTier

__all__ = ["RunRecorder", "describe_run", "record_run"]

logger = logging.getLogger(__name__)


class RunRecorder:
    """Follows the steps of one engine while it is recorded; `gemini.GeminiDDP.record` makes it.

    Args:
        runtime: the engine's runtime.
        writer: the recording's writer; closed with this.
        steps: steps whose moves are recorded, counted from now on; None: all.
    """

    def __init__(self, runtime: Runtime, writer: RecordingWriter, *, steps: Collection[int] | None) -> None:
        self._runtime = runtime
        self._steps = steps
        self._recorder = Recorder(writer, self._sample_memory)
        self._number = 0
        self._begin_ns: int | None = None  # start of the current step, if there is one
        self._is_detailed = False
        self._counted = self._count()
        runtime.passes.moments.add(self)
        runtime.listeners.add(self)

    def log(self, **values: float | torch.Tensor) -> None:
        """Report numbers for the current step, or between steps for the last one.

        Args:
            **values: numbers by name; the report knows `loss`, and `tokens`, which it turns into a rate. A tensor must
                have one element.
        """
        step = self._number if self._begin_ns is not None else max(self._number - 1, 0)
        self._recorder.log(step, {name: _number(value) for name, value in values.items()})

    def moment(self, kind: str, unit_id: int) -> None:
        """React to a moment; see MomentListener."""
        if kind == "enter" and self._begin_ns is None and torch.is_grad_enabled():
            self._begin_step()
        if self._is_detailed:
            self._recorder.moment(kind, unit_id)

    def chunk_became(self, chunk_id: int, state: str) -> None:
        """Note a state; see RunListener."""
        if self._is_detailed:
            self._recorder.chunk_became(chunk_id, state)

    def stalled(self, reason: str, chunk_id: int, begin_s: float, end_s: float) -> None:
        """Note a wait; see RunListener."""
        if self._is_detailed:
            self._recorder.stalled(reason, chunk_id, begin_s, end_s)

    def updates_begin(self) -> None:
        """Note the moment; see RunListener."""
        if self._is_detailed:
            self._recorder.moment("update", None)

    def close(self) -> None:
        """Write what is left and stop recording."""
        self._runtime.passes.moments.remove(self)
        self._runtime.listeners.remove(self)
        if self._is_detailed:
            self._record_details(False)
        self._recorder.close()

    def _begin_step(self) -> None:
        self._begin_ns = time.perf_counter_ns()
        wants_details = self._steps is None or self._number in self._steps
        if wants_details is not self._is_detailed:
            self._record_details(wants_details)

    def step_ended(self) -> None:
        """Write the step down; see RunListener."""
        if self._begin_ns is None:  # its forward came before the recording
            return
        counted = self._count()
        spent = {name: counted[name] - before for name, before in self._counted.items()}
        step = Step(
            number=self._number,
            begin_ns=self._begin_ns,
            end_ns=time.perf_counter_ns(),
            is_detailed=self._is_detailed,
            weights_stall_s=spent["weights_stall_s"],
            update_stall_s=spent["update_stall_s"],
            num_fetches=int(spent["num_fetches"]),
            num_misses=int(spent["num_misses"]),
            fetched_nbytes=int(spent["fetched_nbytes"]),
            nvme_read_nbytes=int(spent["nvme_read_nbytes"]),
            nvme_written_nbytes=int(spent["nvme_written_nbytes"]),
        )
        self._counted, self._begin_ns = counted, None
        self._number += 1
        self._recorder.add(step)

    def _record_details(self, is_detailed: bool) -> None:
        """Begin to record every move, or end it."""
        self._is_detailed = is_detailed
        if not is_detailed:
            self._recorder.detach()
            return
        for chunk in self._runtime.core.chunks:
            self._recorder.chunk_became(chunk.spec.chunk_id, chunk.state.value)
        self._recorder.attach(_sources_of(self._runtime))

    def _count(self) -> dict[str, float]:
        """Return counters that only grow, by the names of Step's fields."""
        stats, store = self._runtime.core.stats, self._runtime.resources.store
        disk = IoStats(nbytes_read=0, nbytes_written=0) if store is None else store.stats()
        return {
            "weights_stall_s": stats.stall_s,
            "update_stall_s": self._runtime.updates.stall_s,
            "num_fetches": stats.num_fetches,
            "num_misses": stats.num_misses,
            "fetched_nbytes": stats.fetched_nbytes,
            "nvme_read_nbytes": disk.nbytes_read,
            "nvme_written_nbytes": disk.nbytes_written,
        }

    def _sample_memory(self) -> Iterator[MemorySample]:
        now_ns, resources = time.perf_counter_ns(), self._runtime.resources
        for tier in (MemoryTier.DEVICE, MemoryTier.HOST):
            other = _other_nbytes(self._runtime) if tier is resources.transfers.compute_tier else None
            held = resources.ledger.by_purpose(tier)
            if held or other is not None:
                yield MemorySample(now_ns, tier.value, held, other)
        if resources.store is not None:
            yield MemorySample(now_ns, MemoryTier.NVME.value, {"swap file": resources.store.held_nbytes}, None)


def _number(value: float | torch.Tensor) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def _sources_of(runtime: Runtime) -> list[SpanSource]:
    resources = runtime.resources
    sources: list[SpanSource] = [resources.pool]
    if resources.store is not None:
        sources.append(resources.store.span_source)
    if isinstance(resources.transfers, StreamTransfers):  # copies of the other transfers are the pool's
        sources.append(resources.transfers)
    return sources


def _other_nbytes(runtime: Runtime) -> int | None:
    """Return the bytes in compute memory that are not the engine's; None where they are not counted."""
    accelerator = runtime.resources.accelerator
    if accelerator is not None:
        held = runtime.resources.ledger.held_nbytes(MemoryTier.DEVICE)
        return max(0, accelerator.allocated_nbytes() - held)
    heap = statistics()
    return None if heap is None else heap.live_nbytes


@contextmanager
def record_run(
    runtime: Runtime,
    directory: Path,
    *,
    steps: Collection[int] | None,
    expected: tuple[StepPrediction | None, int | None],
) -> Iterator[RunRecorder]:
    """Record an engine while the context is open; see gemini.GeminiDDP.record.

    Args:
        runtime: the engine's runtime.
        directory: directory of the recording.
        steps: steps whose moves are recorded; None: all.
        expected: as for `describe_run`.

    Yields:
        The recorder.

    Raises:
        ConfigError: the engine is already being recorded.
        OffloadIOError: the file cannot be made.
    """
    runtime.check_usable()
    if any(isinstance(listener, RunRecorder) for listener in runtime.passes.moments.listeners):
        raise ConfigError("GeminiDDP.record: the engine is being recorded already; leave that context first")
    with RecordingWriter(directory, describe_run(runtime, *expected)) as writer:
        recorder = RunRecorder(runtime, writer, steps=steps)
        logger.info("recording to %s", directory)
        try:
            yield recorder
        finally:
            recorder.close()


def describe_run(
    runtime: Runtime, predicted: StepPrediction | None, activation_nbytes: int | None = None
) -> RunDescription:
    """Describe an engine for the head of a recording.

    Args:
        runtime: the engine's runtime.
        predicted: the cost model's prediction of a step, if there is one.
        activation_nbytes: expected peak of activations and temporaries, if known.

    Returns:
        The description, with the plan in force now.
    """
    plan, layout, demand = runtime.plan, runtime.layout, runtime.demand
    ledger = runtime.resources.ledger
    prediction = None
    if predicted is not None:
        prediction = Prediction(
            step_s=predicted.step_s,
            seconds={channel.value: seconds for channel, seconds in predicted.seconds.items()},
            bottleneck=predicted.bottleneck.value,
            overlap=predicted.overlap,
        )
    tiers = tuple(
        TierDescription(
            tier=tier.value, budget_nbytes=ledger.budget_nbytes(tier), planned_nbytes=dict(demand.by_purpose[tier])
        )
        for tier in MemoryTier
    )
    return RunDescription(
        rank=runtime.sharding.group.rank,
        began_ns=time.perf_counter_ns(),
        began_unix_s=time.time(),
        compute_tier=runtime.resources.transfers.compute_tier.value,
        dtype=str(runtime.config.dtype).removeprefix("torch."),
        overlap=runtime.updates.overlap.mode.value,
        num_params=sum(place.spec.numel for place in layout.place_by_name.values()),
        num_slots=plan.num_slots,
        slot_nbytes=plan.slot_nbytes,
        units=tuple(unit.module_name for unit in layout.units),
        chunks=tuple(_describe_chunk(runtime, chunk_id) for chunk_id in range(len(layout.chunks))),
        tiers=tiers,
        predicted=prediction,
        predicted_activation_nbytes=activation_nbytes,
    )


def _describe_chunk(runtime: Runtime, chunk_id: int) -> ChunkDescription:
    chunk, state = runtime.core.chunks[chunk_id], runtime.states.get(chunk_id)
    homes = {"weights": _nbytes_by_tier(chunk.home)}
    if state is not None:
        homes["state"] = _nbytes_by_tier(state)
        homes["gradients"] = _nbytes_by_tier(runtime.gradients.home_of(chunk_id))
    return ChunkDescription(
        chunk_id=chunk_id,
        name=chunk.name,
        unit_id=chunk.spec.unit_id,
        nbytes=chunk.slot_nbytes,
        is_trainable=chunk.spec.is_trainable,
        is_resident=chunk.is_resident,
        homes=homes,
    )


def _nbytes_by_tier(home: TiledHome) -> dict[str, int]:
    return {tier.value: home.nbytes(tier) for tier in MemoryTier if home.nbytes(tier)}
