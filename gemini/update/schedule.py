"""Which update runs when: in the step, behind the next forward, or ahead of the step while backward goes on.

An update ahead of the step assumes that nothing will be clipped or skipped and that hyper-parameters stay. It reads
what everybody reads and writes to spare places, on disk or in host memory, that nobody reads. `take_step` compares
what it assumed with what the step wants: equal, and the places are exchanged; else it is dropped and done again, from
the same weights and gradients. So no mode changes a bit, and until `take_step` nothing has happened.

After `take_step` a chunk is UPDATING until `finish`, which whoever needs it calls first.

Where steps are committed nothing runs ahead: `hold` decides about a step, and `release` lets its updates go once the
decision is where it outlives the process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from gemini.chunk.core import ChunkCore
from gemini.errors import GeminiError, ModelError
from gemini.gradients.arrivals import ArrivedGradients, Gradients
from gemini.kernels.adam_tile import clip_segments
from gemini.kernels.device import DeviceKernels
from gemini.kernels.pool import Ticket
from gemini.offload.home import TiledHome
from gemini.offload.transfer import Mark
from gemini.placement.overlap import OverlapMode
from gemini.profile.listeners import RunListeners
from gemini.tiers import MemoryTier, TileGrid
from gemini.update.job import DeferredStep, PlannedUpdate, UpdateJob
from gemini.update.overlap_choice import OverlapChoice
from gemini.update.pipeline import tiles_of, update_on_device
from gemini.update.worker import UpdateWorker

__all__ = ["UpdateSchedule", "UpdateStats"]


@dataclass(slots=True)
class UpdateStats:
    """Updates of chunks since construction."""

    num_updates: int = 0
    num_ahead: int = 0
    """Updates that were started ahead of the step."""
    num_redone: int = 0
    """Those of them that did not count."""


class UpdateSchedule:
    """The updates of one engine.

    Args:
        asked: the user's mode; None: choose by measurement.
        core: chunks and slots.
        states: home of each trainable chunk's optimizer state, by chunk id.
        gradients: tells this object what arrives.
        worker: updates what lives in host memory and on disk; closed here.
        kernels: update what lives on the device.
        listeners: told when a step's updates begin, and when it ends.
        predict: returns what the coming step will probably ask of a chunk; None if nobody knows.
        distance: returns how soon the next forward needs a chunk, lower is sooner.
    """

    def __init__(
        self,
        asked: OverlapMode | None,
        *,
        core: ChunkCore,
        states: Mapping[int, TiledHome],
        gradients: Gradients,
        worker: UpdateWorker,
        kernels: DeviceKernels,
        listeners: RunListeners,
        predict: Callable[[int], PlannedUpdate | None] = lambda chunk_id: None,
        distance: Callable[[int], int] = lambda chunk_id: chunk_id,
    ) -> None:
        self.stats = UpdateStats()
        self.failure: str | None = None
        """Why weights and state are no longer those of any one step; None while they are."""
        self.deferred: DeferredStep | None = None
        """The step whose updates wait for `release`; None: no step does."""
        self._core = core
        self._states = states
        self._gradients = gradients
        self._worker = worker
        self._kernels = kernels
        self._listeners = listeners
        self._predict = predict
        self._distance = distance
        self._ahead: dict[int, UpdateJob] = {}
        self._pending: dict[int, list[UpdateJob]] = {}
        self._grad_slots: dict[int, torch.Tensor] = {}
        self._backwards_per_step = 0
        has_device = core.resources.transfers.compute_tier is MemoryTier.DEVICE
        has_traffic = has_device or any(
            home.is_on_disk for chunk_id in states for home in (states[chunk_id], core.chunks[chunk_id].home)
        )
        has_spares = any(state.has_spare(tile) for state in states.values() for tile in range(len(state.tiers)))
        self.overlap = OverlapChoice(asked, worker, has_traffic=has_traffic, has_spares=has_spares)
        """When the updates of the step under way run."""
        gradients.follow(self)

    # ---------------------------------------------------------------- during backward

    def gradients_complete(self, chunk_id: int, arrived: ArrivedGradients) -> bool:
        """Update a chunk ahead of the step, as far as that can be taken back; see GradientListener."""
        if arrived.slot is not None:
            self._grad_slots[chunk_id] = arrived.slot
        is_last_backward = self._gradients.num_backwards >= self._backwards_per_step > 0
        if self.overlap.mode is OverlapMode.SPECULATIVE and is_last_backward:
            update = self._predict(chunk_id)
            if update is not None:
                self._start_ahead(chunk_id, self._at_home(chunk_id, update), arrived.tickets)
        return arrived.slot is not None

    def _start_ahead(self, chunk_id: int, update: PlannedUpdate, arrivals: tuple[Ticket, ...]) -> None:
        chunk, state = self._core.chunks[chunk_id], self._states[chunk_id]
        touched = tiles_of(update.segments, self._worker.tile_numel)
        tiles = tuple(tile for tile in touched if state.has_spare(tile))
        if chunk.is_resident:  # whose copy shows the old weights until the step, and is refreshed from host memory
            tiles = tuple(tile for tile in tiles if chunk.home.tiers[tile] is MemoryTier.HOST)
        if not tiles:
            return
        job = self._job(chunk_id, update, tiles, arrivals)
        job.is_ahead = True
        self._ahead[chunk_id] = job
        self.stats.num_ahead += 1
        self._worker.submit(job, distance=self._distance(chunk_id))

    def gradients_change(self, chunk_id: int) -> None:
        """Drop what was made of a chunk's gradients ahead of the step; see GradientListener."""
        self.check_released()
        self.finish(chunk_id)
        self._drop(chunk_id)
        self.leave_gradient_slot(chunk_id)

    def leave_gradient_slot(self, chunk_id: int) -> None:
        """Read a chunk's gradients from disk from here on; see GradientListener."""
        self._grad_slots.pop(chunk_id, None)
        for job in (*self._pending.get(chunk_id, ()), *filter(None, [self._ahead.get(chunk_id)])):
            self._worker.release_gradients(job)

    def weights_change(self, chunk_id: int) -> None:
        """Settle a chunk whose weights somebody is about to write, and drop what was made of the old ones."""
        self.finish(chunk_id)
        self._drop(chunk_id)

    def discard(self) -> None:
        """Drop everything that was updated ahead: there will be no step, or weights or state are about to change."""
        for chunk_id in list(self._ahead):
            self._drop(chunk_id)

    def _drop(self, chunk_id: int) -> None:
        job = self._ahead.pop(chunk_id, None)
        if job is not None:
            self.stats.num_redone += 1
            self._worker.cancel(job)

    # ---------------------------------------------------------------- the step

    def take_step(self, planned: Mapping[int, PlannedUpdate], *, kept: Collection[int]) -> None:
        """Make a step's updates happen: those made ahead count now, the others run now or behind the next forward.

        Args:
            planned: what to do to each chunk; all gradients have arrived.
            kept: chunks that may keep their slot, because they are needed again soon.

        Raises:
            OffloadIOError: state could not be read or written; `failure` says so too.
            IllegalTransitionError: a chunk is held; nothing has happened.
            ModelError: someone looks at a slot that will show other weights; nothing has happened.
            WorkerError: the thread for updates cannot be started; nothing has happened.
        """
        planned = {chunk_id: self._at_home(chunk_id, update) for chunk_id, update in planned.items()}
        for chunk_id, job in list(self._ahead.items()):
            update = planned.get(chunk_id)
            if update is None or (job.segments, job.grad_scale) != (update.segments, update.grad_scale):
                self._drop(chunk_id)
        self._check_updatable(planned)
        self._start_updates(planned, kept=kept)

    def defer(self, planned: Mapping[int, PlannedUpdate], *, kept: Collection[int]) -> None:
        """Decide about a step whose updates must not begin yet; arguments and errors as for `take_step`."""
        self.check_released()
        at_home = {chunk_id: self._at_home(chunk_id, update) for chunk_id, update in planned.items()}
        self._check_updatable(at_home)
        self.deferred = DeferredStep(at_home, frozenset(kept))

    def check_released(self) -> None:
        """Raise ModelError if a step's updates are deferred."""
        if self.deferred is not None:
            raise ModelError(
                "the last step's updates wait to be committed: call engine.commit(...) after every optimizer.step(), "
                "and after scheduler.step() if there is one"
            )

    def prepare_release(self) -> DeferredStep:
        """Make sure that `release` will succeed, and that everything before the deferred step is where it belongs.

        Returns:
            The deferred step, or one that does nothing.

        Raises:
            OffloadIOError: an earlier update, or a gradient, could not be written.
            IllegalTransitionError: a chunk is held.
            ModelError: someone looks at a slot that will show other weights.
            WorkerError: the thread for updates cannot be started.
        """
        self.finish_all()
        for chunk_id, state in self._states.items():
            for home in (state, self._core.chunks[chunk_id].home, self._gradients.home_of(chunk_id)):
                home.finish_writes()
        deferred = self.deferred or DeferredStep({}, frozenset())
        self._check_updatable(deferred.planned)
        return deferred

    def release(self, sequence: int) -> None:
        """Let the deferred updates go, as `take_step`, once they are published under a sequence."""
        deferred, self.deferred = self.deferred, None
        if deferred is not None:
            self._start_updates(deferred.planned, kept=deferred.kept, sequence=sequence)

    def _check_updatable(self, planned: Mapping[int, PlannedUpdate]) -> None:
        """Make sure that updates can start, while nothing has happened yet."""
        for chunk_id in planned:
            self._core.check_updatable(chunk_id)
        if any(MemoryTier.DEVICE not in self._states[chunk_id].tiers for chunk_id in planned):
            self._worker.start()

    def _start_updates(self, planned: Mapping[int, PlannedUpdate], *, kept: Collection[int], sequence: int = 0) -> None:
        self._listeners.updates_begin()
        try:
            readers = self._core.resources.transfers.mark()
            for chunk_id in sorted(planned, key=self._distance):
                keeps_slot = chunk_id in kept
                self._update_chunk(
                    chunk_id, planned[chunk_id], keeps_slot=keeps_slot, readers=readers, sequence=sequence
                )
            if self.overlap.mode is OverlapMode.OFF:
                self.finish_all()
        except BaseException as error:
            self.failure = f"an optimizer step failed half way ({error})"
            raise

    def _update_chunk(
        self, chunk_id: int, update: PlannedUpdate, *, keeps_slot: bool, readers: Mark, sequence: int
    ) -> None:
        state, chunk = self._states[chunk_id], self._core.chunks[chunk_id]
        tiles = tiles_of(update.segments, self._worker.tile_numel)
        distance = self._distance(chunk_id)
        self.stats.num_updates += 1
        if MemoryTier.DEVICE in state.tiers:
            self._core.begin_update(chunk_id, keeps_slot=False)
            update_on_device(self._job(chunk_id, update, tiles), self._worker.tile_numel, self._kernels)
            self._core.end_update(chunk_id)
            return
        job = self._ahead.get(chunk_id)
        may_refresh = (keeps_slot or chunk.is_resident) and chunk.shard is None
        copy = chunk.compute if may_refresh else None
        if job is not None:
            job.readers = readers
            if not self._worker.adjust(job, distance=distance, refreshes=copy):  # tiles have gone by
                copy = copy if self._can_refresh_late(job) else None
                job.refreshes_late = copy
        self._core.begin_update(chunk_id, keeps_slot=copy is not None, updater=self)
        refreshes = copy if chunk.slot is not None else None
        jobs = self._pending[chunk_id] = [] if job is None else [job]
        self._ahead.pop(chunk_id, None)
        rest = tuple(tile for tile in tiles if job is None or tile not in job.tiles)
        if rest:
            jobs.append(self._job(chunk_id, update, rest, refreshes=refreshes, readers=readers, sequence=sequence))
            self._worker.submit(jobs[-1], distance=distance)
        elif job is not None and self._worker.is_updated(job):
            self._let_count(job)

    def _can_refresh_late(self, job: UpdateJob) -> bool:
        """Return whether a copy on the device can be filled from the homes at once: none of them is on disk."""
        has_device = self._core.resources.transfers.compute_tier is MemoryTier.DEVICE
        return has_device and all(job.working.tiers[tile] is MemoryTier.HOST for tile in job.tiles)

    def _let_count(self, job: UpdateJob) -> None:
        """Make what an updated job has written to spare places the homes' content; no other job of the chunk runs."""
        if job.counts:
            return
        job.counts = True
        ahead = [tile for tile in job.tiles if job.goes_ahead(tile)]
        job.state.flip(ahead)
        job.working.flip(ahead)
        if job.refreshes_late is None:
            return
        grid = TileGrid(job.spec.numel, self._worker.tile_numel)
        for tile in job.tiles:
            begin, end = grid.range_of(tile)
            source = job.working.tile(tile)[: (end - begin) * job.spec.dtype.itemsize].view(job.spec.dtype)
            record = f"weights of {job.spec.name}"
            transfers = self._core.resources.transfers
            job.refreshing.append(
                transfers.upload(job.refreshes_late[begin:end], source, after=job.readers, record=record)
            )

    def _job(
        self,
        chunk_id: int,
        update: PlannedUpdate,
        tiles: tuple[int, ...],
        arrivals: tuple[Ticket, ...] = (),
        refreshes: torch.Tensor | None = None,
        readers: Mark | None = None,
        sequence: int = 0,
    ) -> UpdateJob:
        return UpdateJob(
            spec=self._core.chunks[chunk_id].home_spec,
            working=self._core.chunks[chunk_id].home,
            state=self._states[chunk_id],
            grad=self._gradients.home_of(chunk_id),
            grad_dtype=self._gradients.dtype_of(chunk_id),
            segments=update.segments,
            grad_scale=update.grad_scale,
            tiles=tiles,
            sequence=sequence,
            arrivals=arrivals,
            grad_slot=self._grad_slots.get(chunk_id),
            refreshes=refreshes,
            readers=readers,
        )

    def _at_home(self, chunk_id: int, update: PlannedUpdate) -> PlannedUpdate:
        """Return what a update does to the part of a chunk that its home holds, in the home's coordinates."""
        shard = self._core.chunks[chunk_id].shard
        if shard is None:
            return update
        return dataclasses.replace(update, segments=clip_segments(update.segments, shard.begin, shard.end))

    def end_step(self, *, is_clipped: bool) -> None:
        """Learn from a step, taken or skipped, and choose the mode of the next.

        Args:
            is_clipped: whether its gradients were clipped or not finite, so that nothing made ahead could count.
        """
        self.discard()
        self._backwards_per_step = self._gradients.num_backwards
        self.overlap.end_step(is_clipped=is_clipped)
        self._listeners.step_ended()

    # ---------------------------------------------------------------- after the step

    def is_finished(self, chunk_id: int) -> bool:
        """Return whether `finish` would return at once."""
        return all(self._worker.is_updated(job) for job in self._pending.get(chunk_id, ()))

    def finish(self, chunk_id: int) -> None:
        """Wait until a chunk's update is complete, and let its new weights count.

        Args:
            chunk_id: the chunk; one that is not being updated is left alone.

        Raises:
            OffloadIOError: the update failed; the engine's state is lost.
        """
        jobs = self._pending.get(chunk_id)
        if jobs is None:
            return
        try:
            for job in jobs:
                self._worker.wait(job)
        except GeminiError as error:
            self.failure = f"an optimizer step failed half way ({error})"
            raise
        del self._pending[chunk_id]
        for job in jobs:
            self._let_count(job)
            for copy in job.refreshing:
                copy.wait() if isinstance(copy, Ticket) else copy.wait_on_compute()
            job.refreshes = job.refreshes_late = None  # nobody but the chunk may look at its slot
        self._core.end_update(chunk_id)

    def finish_all(self) -> None:
        """Wait until no update is under way; as `finish`."""
        for chunk_id in sorted(self._pending, key=self._distance):
            self.finish(chunk_id)

    @property
    def stall_s(self) -> float:
        """Seconds that training has waited for updates."""
        return self._worker.stall_s

    def close(self) -> None:
        """Drop what has not begun, wait for the rest, end the thread."""
        self._worker.close()
        self._pending.clear()
        self._ahead.clear()
