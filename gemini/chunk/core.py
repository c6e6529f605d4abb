"""Chunks and the compute memory they take turns in: access, release, prefetch, evict, move.

A chunk leaves its slot when another one needs it: `_take_slot` says which may leave, gemini.placement.eviction which of
them does. What comes early, and leaves for it, is decided by gemini.placement.prefetch and asked for by
gemini.runtime.lookahead. Here the bytes move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

from gemini.chunk.chunk import Chunk, Slot, viewed_error
from gemini.chunk.fetch import Fetch, Gather, MoveStats
from gemini.chunk.layout import ChunkSpec
from gemini.chunk.residents import Residents
from gemini.chunk.shown_params import ShownParams, placeholders
from gemini.chunk.slot_table import SlotTable
from gemini.chunk.staging import Staging
from gemini.chunk.state import ChunkState, ChunkUpdater, check_transition
from gemini.errors import GeminiError
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.offload.slots import SlotSource
from gemini.placement.eviction import farthest_next_use
from gemini.profile.listeners import RunListeners
from gemini.ranks.one_rank import PRIVATE_HOMES
from gemini.ranks.sharding import ChunkShard, ShardGroup, SharedHomes
from gemini.tiers import MemoryTier

__all__ = ["ChunkCore"]


class ChunkCore:
    """The chunks of one engine and the slots they share.

    Args:
        resources: memory, disk, threads and copy engine; not closed here.
        slots: compute memory that chunks without a residence take turns in; closed with the core.
        staging: host memory between disk and device; closed with the core.
        group: the ranks that own the shards of chunks.
        next_use: returns in how many uses from now a chunk, given by its id, is used again.
        listeners: told of chunks' states and of waits for them.
        shared_homes: homes of shards that other ranks read themselves; closed with the core.
        num_protected: how many of the most recently used chunks are never evicted.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        slots: SlotSource,
        staging: SlotSource,
        group: ShardGroup,
        next_use: Callable[[int], int],
        listeners: RunListeners,
        shared_homes: SharedHomes = PRIVATE_HOMES,
        num_protected: int = 1,
    ) -> None:
        self.resources = resources
        self.chunks: list[Chunk] = []
        self.stats = MoveStats()
        self.residents = Residents(self.chunks, resources.transfers, evict=self.evict, fetch=self._fetch)
        self._next_use = next_use
        self._listeners = listeners
        self.slots = SlotTable(slots, num_protected=num_protected)
        self._staging = Staging(staging)
        self._stages_pageable = False
        """Whether weights in memory that is not page-locked pass through `staging`, which is."""
        self.shared_homes = shared_homes
        """Homes of shards that other ranks read themselves."""
        self.by_placeholder: dict[int, Chunk] = {}  # all chunks, by the address of their placeholders
        self._group = group

    # ---------------------------------------------------------------- registering

    def add(
        self,
        spec: ChunkSpec,
        params: Sequence[torch.Tensor],
        home: TiledHome,
        *,
        is_resident: bool,
        shard: ChunkShard | None = None,
    ) -> Chunk:
        """Take charge of a chunk whose home already holds its weights, or will before the first access.

        Args:
            spec: the layout; `spec.chunk_id` must be the number of chunks added so far.
            params: parameters or tensors to bind, in the order of the layout's places.
            home: where the weights live.
            is_resident: keep them in compute memory all the time: in the home itself where that is compute
                memory, else in a copy.
            shard: the shard that the home holds; None: it holds everything.

        Returns:
            The chunk, at home; `residents.bring_in` makes a resident one ready.
        """
        assert spec.chunk_id == len(self.chunks)
        missing = placeholders(spec.dtype, self.resources.transfers.device, len(params))
        shown = ShownParams(spec, params, missing)
        chunk = Chunk(spec, shown, home, is_resident=is_resident, listeners=self._listeners, shard=shard)
        chunk.unbind()
        self.by_placeholder[chunk.params.placeholder_address] = chunk
        self.chunks.append(chunk)
        return chunk

    def stage_pageable(self, staging: SlotSource | None) -> None:
        """Let weights in memory that is not page-locked pass through slots that are; nothing is under way.

        Args:
            staging: takes the place of the staging slots before, which are closed; None if these are large enough.
        """
        if staging is not None:
            self._staging.close()
            self._staging = Staging(staging)
        self._stages_pageable = True

    # ---------------------------------------------------------------- hot path

    def access(self, chunk_id: int) -> Chunk:
        """Hold a chunk: its parameters show its weights until as many `release` calls follow.

        Args:
            chunk_id: the chunk.

        Returns:
            The chunk, held.

        Raises:
            OutOfTierMemoryError: every slot is held.
            OffloadIOError: the weights cannot be read.
        """
        chunk = self.ensure(chunk_id)
        chunk.hold()
        return chunk

    def release(self, chunk_id: int) -> bool:
        """End one hold and return whether it was the last; the weights stay until their slot is needed."""
        return self.chunks[chunk_id].let_go()

    def ensure(self, chunk_id: int) -> Chunk:
        """Make a chunk's weights usable now, without a hold: it stays among the last few used.

        Args:
            chunk_id: the chunk.

        Returns:
            The chunk, ready or held.

        Raises:
            OutOfTierMemoryError: every slot is held.
            OffloadIOError: the weights cannot be read.
        """
        chunk = self.chunks[chunk_id]
        if chunk.state is ChunkState.UPDATING:
            self._finish_update(chunk)
        if chunk.is_resident and chunk.compute is not None:
            return chunk
        if chunk.compute is None:
            start = time.perf_counter()
            if chunk.fetch is None:
                self._take_slot(chunk)
                self._start_fetch(chunk)
                self.stats.num_misses += 1
            self._finish_fetch(chunk)
            end = time.perf_counter()
            self.stats.stall_s += end - start
            self._listeners.stalled("weights", chunk_id, start, end)
        if chunk.is_resident:
            return chunk
        self.slots.protect(chunk_id, is_used_now=True)
        return chunk

    def can_prefetch(self, chunk_id: int) -> bool:
        """Return whether a fetch of this chunk could start now without waiting, given a slot."""
        chunk = self.chunks[chunk_id]
        if chunk.state is ChunkState.UPDATING:
            if chunk.updater is None or not chunk.updater.is_finished(chunk_id):
                return False
            self._finish_update(chunk)
        if chunk.home.is_being_written():
            return False
        return not self._needs_staging(chunk) or self._staging.is_free()

    def prefetch(self, chunk_id: int) -> None:
        """Start fetching a chunk that will be needed soon; one that is there or on its way is left alone.

        Args:
            chunk_id: the chunk.

        Raises:
            OutOfTierMemoryError: no slot is free and none can be freed.
        """
        chunk = self.chunks[chunk_id]
        if chunk.state is ChunkState.UPDATING:
            self._finish_update(chunk)
        if chunk.compute is not None or chunk.fetch is not None:
            return
        self._take_slot(chunk)
        self._start_fetch(chunk)

    def begin_gather(self, chunk_id: int) -> None:
        """Start making a chunk whole whose own shard is on its way to compute memory; waits for that shard only.

        Args:
            chunk_id: the chunk; one that is not on its way is left alone.

        Raises:
            OffloadIOError: the shard cannot be read.
            CollectiveError: the group has failed.
        """
        fetch = self.chunks[chunk_id].fetch
        if fetch is not None:
            fetch.begin_gather()

    def poll(self) -> None:
        """Push every fetch under way one stage further, and finish those that are complete."""
        for chunk in self.slots.chunks(ChunkState.FETCHING):
            if chunk.fetch is not None:
                chunk.fetch.poll()

    def evict(self, chunk_id: int) -> None:
        """Free a chunk's slot; the home still holds the weights, so nothing is copied.

        Args:
            chunk_id: the chunk; not resident.

        Raises:
            IllegalTransitionError: the chunk is held.
            ModelError: someone still looks at the slot, which will show other weights.
        """
        chunk = self.chunks[chunk_id]
        assert not chunk.is_resident, f"{chunk.name} is resident"
        if chunk.slot is None:
            return
        if chunk.fetch is not None:
            chunk.fetch.abandon()
            chunk.fetch = None
        chunk.transition(ChunkState.AT_HOME)
        if self._leave_slot(chunk):
            raise viewed_error(chunk)

    def evict_idle(self) -> None:
        """Free every slot that is not held."""
        self.slots.protect_none()
        for chunk_id in self.slots.evictable() | _ids(self.slots.chunks(ChunkState.FETCHING)):
            self.evict(chunk_id)

    # ---------------------------------------------------------------- for the optimizer and for others

    def chunk_in(self, storage_address: int) -> Chunk | None:
        """Return the chunk whose weights a storage of compute memory holds now, None if it holds none."""
        slot = self.slots.find(storage_address)
        return slot.chunk if slot is not None else self.residents.at(storage_address)

    def has_room(self, chunk_id: int) -> bool:
        """Return whether a chunk can be made usable without taking anything from anybody who uses it."""
        chunk = self.chunks[chunk_id]
        if chunk.is_resident or chunk.compute is not None or chunk.fetch is not None:
            return True
        return bool(self.slots.num_free() or self.slots.evictable() or self.slots.chunks(ChunkState.FETCHING))

    def check_updatable(self, chunk_id: int) -> None:
        """Check that `begin_update` will succeed.

        Args:
            chunk_id: the chunk.

        Raises:
            IllegalTransitionError: the chunk is held.
            ModelError: someone looks at its slot, which will show other weights.
        """
        chunk = self.chunks[chunk_id]
        if chunk.state is ChunkState.UPDATING:
            self._finish_update(chunk)
        if chunk.is_held:
            check_transition(chunk.name, chunk.state, ChunkState.UPDATING)
        if chunk.compute is not None and not chunk.is_resident and self.slots.is_viewed(chunk):
            raise viewed_error(chunk)

    def begin_update(self, chunk_id: int, *, keeps_slot: bool = False, updater: ChunkUpdater | None = None) -> Chunk:
        """Reserve a chunk for the optimizer; its parameters show a placeholder until `end_update`.

        Args:
            chunk_id: the chunk.
            keeps_slot: whether a copy in a slot stays, because the update will refresh it; a resident one always does.
            updater: who ends the update when the chunk is needed; None: the caller ends it before anything else begins.

        Returns:
            The chunk, updating.

        Raises:
            IllegalTransitionError: the chunk is held.
            ModelError: someone looks at its slot, which will show other weights.
        """
        chunk = self.chunks[chunk_id]
        if chunk.state is ChunkState.UPDATING:
            self._finish_update(chunk)
        if not chunk.is_resident and not (keeps_slot and chunk.compute is not None):
            self.evict(chunk_id)
        chunk.begin_update()
        chunk.updater = updater
        if chunk.compute is not None:
            chunk.unbind()
        return chunk

    def end_update(self, chunk_id: int) -> None:
        """Give a chunk back after `begin_update`; its parameters show the new weights if compute memory has them."""
        chunk = self.chunks[chunk_id]
        if chunk.slot is not None:
            if not chunk.is_common:  # else other ranks have changed it too, and what the slot holds is old
                chunk.bind(chunk.slot.buffer)
        elif chunk.is_resident:
            chunk.bind(chunk.in_place_buffer(self.resources.transfers.device))
        chunk.transition(ChunkState.AT_HOME if chunk.compute is None else ChunkState.READY)

    def drop_holds(self) -> None:
        """End all holds, after an exception has unwound whoever had them."""
        for chunk in self.chunks:
            chunk.drop_holds()

    def close(self) -> None:
        """Abandon what is under way and give slots and homes back; parameters show placeholders from here on."""
        for chunk in self.chunks:
            if chunk.state is ChunkState.CLOSED:
                continue
            if chunk.fetch is not None:
                chunk.fetch.abandon()
                chunk.fetch = None
            chunk.unbind()
            chunk.transition(ChunkState.CLOSED)
            if chunk.slot is not None:
                if chunk.is_resident:
                    self.resources.transfers.free(chunk.slot.buffer, "resident copies")
                else:
                    self._leave_slot(chunk)
            chunk.slot = None
            chunk.home.close()
        self.shared_homes.close()
        self.slots.close()
        self._staging.close()

    # ---------------------------------------------------------------- inside

    def _finish_update(self, chunk: Chunk) -> None:
        """Wait until a chunk's update is complete; one that nobody else can end is an error."""
        if chunk.updater is None:
            check_transition(chunk.name, chunk.state, ChunkState.UPDATING)
        else:
            chunk.updater.finish(chunk.spec.chunk_id)

    def _take_slot(self, chunk: Chunk) -> None:
        """Give a chunk that is not resident a slot, evicting others for it if need be."""
        if chunk.is_resident:
            return
        while (slot := self.slots.take(chunk)) is None:
            # Chunks fetched ahead, and those used last, leave only if nothing else can.
            fetching, ready = (_ids(self.slots.chunks(state)) for state in (ChunkState.FETCHING, ChunkState.READY))
            candidates = self.slots.evictable() or fetching or ready
            if not candidates:
                updating = self.slots.chunks(ChunkState.UPDATING)
                if not updating:
                    raise self.slots.shortage_error(chunk, self.resources.transfers.compute_tier)
                self._finish_update(updating[-1])
                continue
            self.evict(farthest_next_use(candidates, {i: self._next_use(i) for i in candidates}))
        chunk.slot = slot

    def _leave_slot(self, chunk: Chunk) -> bool:
        """Give a chunk's slot back; return whether someone still looks at it."""
        assert chunk.slot is not None
        chunk.unbind()
        is_viewed = self.slots.is_viewed(chunk)
        self.slots.give_back(chunk.slot)
        chunk.slot = None
        return is_viewed

    def _needs_staging(self, chunk: Chunk) -> bool:
        if self.resources.transfers.compute_tier is not MemoryTier.DEVICE:
            return False
        return chunk.home.is_on_disk or (self._stages_pageable and chunk.home.is_pageable)

    def _start_fetch(self, chunk: Chunk) -> None:
        assert chunk.slot is not None
        chunk.transition(ChunkState.FETCHING)
        staging = None
        try:
            if self._needs_staging(chunk):
                staging = self._staging.claim(sum(chunk.home.tile_nbytes), chunk.name)
            chunk.fetch = Fetch(
                chunk.home,
                chunk.home_part(chunk.slot.buffer),
                transfers=self.resources.transfers,
                pool=self.resources.pool,
                staging=staging,
                gather=self._gather_of(chunk, chunk.slot),
                record=f"weights of {chunk.name}",
            )
        except GeminiError:
            self._fail_fetch(chunk)
            if staging is not None:
                self._staging.give_back(staging)
            raise
        if staging is not None:
            self._staging.watch(chunk.fetch)
        self.stats.num_fetches += 1
        self.stats.fetched_nbytes += sum(chunk.fetch.nbytes_from.values())
        self.stats.read_nbytes += chunk.fetch.nbytes_from[MemoryTier.NVME]

    def _gather_of(self, chunk: Chunk, slot: Slot) -> Gather | None:
        if chunk.shard is None:
            return None
        group, homes, nbytes = self._group, self.shared_homes, chunk.slot_nbytes
        if homes.has(chunk.spec.chunk_id):
            return lambda copies: homes.gather(chunk.spec.chunk_id, slot.buffer[:nbytes], name=chunk.name)
        return lambda copies: group.all_gather(slot.buffer[:nbytes], name=chunk.name, after=copies)

    def _finish_fetch(self, chunk: Chunk) -> None:
        assert chunk.fetch is not None
        assert chunk.slot is not None
        try:
            chunk.fetch.finish()
        except GeminiError:
            chunk.fetch.abandon()
            self._fail_fetch(chunk)
            raise
        chunk.fetch, chunk.last_fetch = None, chunk.fetch
        chunk.bind(chunk.slot.buffer)
        chunk.transition(ChunkState.READY)

    def _fetch(self, chunk: Chunk) -> None:
        """Fetch a chunk that has a buffer, and wait for it."""
        self._start_fetch(chunk)
        self._finish_fetch(chunk)

    def _fail_fetch(self, chunk: Chunk) -> None:
        """Return to a state from which the fetch can be tried again."""
        chunk.fetch = None
        chunk.transition(ChunkState.AT_HOME)
        if not chunk.is_resident:
            self._leave_slot(chunk)


def _ids(chunks: Iterable[Chunk]) -> set[int]:
    return {chunk.spec.chunk_id for chunk in chunks}
