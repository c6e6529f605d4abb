"""Gradients of a machine's ranks meet in host memory: each rank publishes its slots, and each adds up its own part.

See gemini.ranks.sharding.PartSums. A slot lies in memory that all the ranks map. On the CPU it is compute memory, so
gradients are put together where the others read them; from a device it is copied there.

[Note: Who adds up]
A rank that waits for another in its training thread may be waited for itself, in a collective or for its part of a sum.
So a thread of its own adds up what is this rank's, sum after sum, as soon as all ranks have published: it waits for
published slots alone, and these for nobody. The worker pool does the work. A slot may be filled again when all ranks
have added up their parts of it, for which the training thread waits with the sum.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gemini.kernels.pool import WorkerPool
from gemini.offload.resources import Resources
from gemini.offload.transfer import Move
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier
from zero.failures import SAME_WAY, Failures
from zero.host_pages import NUM_ENTRIES, Peer, Published
from zero.own_groups import Line
from zero.request_log import LOOK_S, Request

__all__ = ["MeetingSums"]

PURPOSE = "exchange slots"
"""What the memory is for, in reports."""


@dataclass(eq=False)
class _Sum:
    """One sum under way."""

    number: int
    request: Request
    slot: Published
    download: Move | None
    """Copy of the slot from the device; None: it has been published."""
    total: torch.Tensor
    """Takes the sum of this rank's part."""
    dtype: torch.dtype
    divisor: int
    is_done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


@dataclass(eq=False)
class _Meeting:
    """What the thread and its users share; the thread holds on to this alone, so that the sums can be collected."""

    peers: Sequence[Peer]
    """All ranks, in rank order."""
    place: int
    """Place of this rank among them."""
    pool: WorkerPool
    coming: queue.SimpleQueue[_Sum | None] = field(default_factory=queue.SimpleQueue)
    is_closing: bool = False

    @property
    def own(self) -> Peer:
        """This rank."""
        return self.peers[self.place]


class MeetingSums:
    """Sums of parts in host memory; see PartSums, whose methods these are.

    Args:
        peers: all ranks of the shard axis, in rank order, with memory of a page and the slots each; closed by others.
        line: the ranks.
        failures: of the group.
        resources: memory, threads and copy engine; not closed here.
        num_slots: sums at the same time.
        slot_nbytes: bytes of a slot.
    """

    are_on_host = True

    def __init__(
        self,
        peers: Sequence[Peer],
        line: Line,
        failures: Failures,
        resources: Resources,
        *,
        num_slots: int,
        slot_nbytes: int,
    ) -> None:
        assert num_slots < NUM_ENTRIES
        self.slot_nbytes = slot_nbytes
        self._line = line
        self._failures = failures
        self._resources = resources
        self._meeting = _Meeting(peers, line.place, resources.pool)
        self._num_started = 0
        self._thread: threading.Thread | None = None
        # - Slots
        own = self._meeting.own.memory
        self._offsets = [IO_ALIGNMENT_NBYTES + index * slot_nbytes for index in range(num_slots)]
        self._on_host = [own[offset : offset + slot_nbytes] for offset in self._offsets]
        self._has_device = resources.transfers.compute_tier is MemoryTier.DEVICE
        self._slots = self._on_host
        if self._has_device:
            self._slots = [resources.transfers.allocate(slot_nbytes, PURPOSE) for _ in range(num_slots)]
        self._stop = weakref.finalize(self, self._meeting.coming.put, None)

    @property
    def slots(self) -> Sequence[torch.Tensor]:
        """Compute memory in which parts are put together."""
        return self._slots

    def start(self, slot: int, *, numel: int, dtype: torch.dtype, divisor: int | None, name: str) -> _PendingSum:
        """Publish a slot and have this rank's part added up; see PartSums.start."""
        request = self._failures.note("sum", name)
        nbytes = self._line.num_ranks * numel * dtype.itemsize
        published = Published(self._offsets[slot], nbytes, request.checksum)
        download = None
        with self._failures.failing(request, self._line):
            if self._has_device:
                parts = self._slots[slot][:nbytes]
                download = self._resources.transfers.download(self._on_host[slot][:nbytes], parts, record=name)
            else:
                self._meeting.own.page.publish(self._num_started, published)
            self._run_thread()
        coming = _Sum(
            number=self._num_started,
            request=request,
            slot=published,
            download=download,
            total=torch.empty(numel, dtype=torch.float32 if divisor is None else dtype),
            dtype=dtype,
            divisor=divisor or 1,
        )
        self._num_started += 1
        self._meeting.coming.put(coming)
        return _PendingSum(self._meeting, self._failures, self._line, coming)

    def _run_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._meeting,), name="gemini-sums", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread and give the memory back. Idempotent. That the rank has left is said when homes are closed."""
        if not self._stop.alive:
            return
        self._meeting.is_closing = True
        self._stop()
        if self._thread is not None:
            self._thread.join()
        self._resources.arena.free(self._meeting.own.memory)
        for slot in self._slots if self._has_device else ():
            self._resources.transfers.free(slot, PURPOSE)
        self._slots, self._on_host = [], []
        self._meeting.peers = ()


class _PendingSum:
    """One sum, as the training thread sees it."""

    def __init__(self, meeting: _Meeting, failures: Failures, line: Line, coming: _Sum) -> None:
        self._meeting = meeting
        self._failures = failures
        self._line = line
        self._coming = coming

    def wait(self) -> torch.Tensor:
        """Return the sum when all ranks have added up theirs; see PendingSum."""
        coming, request, line = self._coming, self._coming.request, self._line
        with self._failures.failing(request, line):
            while not coming.is_done.wait(LOOK_S):
                self._failures.look(request, line)
            if isinstance(coming.error, DifferentRequestError):
                self._failures.fail(request, str(coming.error))
            if coming.error is not None:
                raise coming.error
            for peer in self._meeting.peers:
                page = peer.page
                peer.wait_for(
                    lambda page=page: page.has_taken(coming.number),  # type: ignore[misc]
                    look=lambda: self._failures.look(request, line),
                )
        return coming.total


class DifferentRequestError(Exception):
    """Another rank has called a different collective."""


def _serve(meeting: _Meeting) -> None:
    """Add up what comes until None does; after a failure nothing is."""
    failure: Exception | None = None
    while (coming := meeting.coming.get()) is not None:
        try:
            if failure is None:
                _add_up(meeting, coming)
        except Exception as error:
            failure = error
            meeting.own.page.leave()
        coming.error = failure
        coming.is_done.set()


def _add_up(meeting: _Meeting, coming: _Sum) -> None:
    """Add up this rank's part of all ranks' slots."""
    if coming.download is not None:
        coming.download.wait_on_host()
        meeting.own.page.publish(coming.number, coming.slot)
    part_nbytes = coming.slot.nbytes // len(meeting.peers)
    begin = meeting.place * part_nbytes
    parts = []
    for peer in meeting.peers:
        slot = _await_slot(meeting, peer, coming)
        part = peer.memory[slot.offset + begin : slot.offset + begin + part_nbytes]
        parts.append(part.view(coming.dtype))
    meeting.pool.submit_sum(coming.total, parts, divisor=coming.divisor, record=coming.request.what).wait()
    meeting.own.page.take(coming.number)


def _await_slot(meeting: _Meeting, peer: Peer, coming: _Sum) -> Published:
    """Wait until a rank has published its slot for a sum."""
    found: Published | None = None

    def is_there() -> bool:
        nonlocal found
        found = peer.page.find(coming.number)
        return found is not None

    def look() -> None:
        if meeting.is_closing:
            raise RuntimeError("this rank closes its engine")

    peer.wait_for(is_there, look=look)
    assert found is not None
    if (found.nbytes, found.checksum) != (coming.slot.nbytes, coming.slot.checksum):
        raise DifferentRequestError(
            f"rank {meeting.own.rank} and rank {peer.rank} have called different collectives: {SAME_WAY}"
        )
    return found
