"""Weights of a machine's ranks are read where they live: each rank fills its slots from the homes of all.

See gemini.ranks.sharding.SharedHomes. Each rank's homes lie in memory that the others map. A gather is numbered, the
same on all ranks: a rank says that its shard may be read when it asks for the gather, and that it has read the others'
when its copies have ended. Who is about to write a home waits until all have read what they last gathered of it.

[Note: Who copies]
A copy of another rank's shard waits for that rank, so it is a thread of its own that starts copies, gather after
gather. It waits for what ranks say when they ask for a gather, and that waits for nobody.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from gemini.kernels.pool import Ticket
from gemini.offload.arena import MemorySource
from gemini.offload.home import HomeReaders
from gemini.offload.memory_file import MemoryFile
from gemini.offload.resources import Resources
from gemini.offload.transfer import Mark, Move
from gemini.tiers import MemoryTier
from zero.failures import Failures
from zero.host_pages import Peer, RankPage
from zero.own_groups import Line
from zero.request_log import LOOK_S, Request
from zero.torch_group import alias_of

__all__ = ["HostWeights"]


@dataclass(frozen=True, slots=True, eq=False)
class _Shard:
    """One rank's shard on its way into a slot."""

    peer: Peer
    home: torch.Tensor
    into: torch.Tensor


@dataclass(eq=False)
class _Gather:
    """One gather under way."""

    number: int
    request: Request
    shards: Sequence[_Shard]
    """The shards of the other ranks; none once their copies have started, as nobody else may look at a slot then."""
    mark: Mark
    """Compute that the copies follow."""
    moves: list[Move | Ticket] = field(default_factory=list)
    are_started: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


@dataclass(eq=False)
class _Copies:
    """What the thread and its users share; the thread holds on to this alone, so that the weights can be collected."""

    resources: Resources
    coming: queue.SimpleQueue[_Gather | None] = field(default_factory=queue.SimpleQueue)
    is_closing: bool = False


class HostWeights:
    """Homes that the ranks of a machine read; see SharedHomes, whose methods these are.

    Args:
        peers: all ranks of the shard axis, in rank order; closed with this.
        homes: memory of each other rank's homes, uint8, as this process sees it; of this rank's own, nothing.
        file: this rank's memory file, from which its homes are taken.
        line: the ranks.
        failures: of the group.
        resources: memory, threads and copy engine; not closed here.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        homes: Sequence[torch.Tensor],
        file: MemoryFile,
        line: Line,
        failures: Failures,
        resources: Resources,
    ) -> None:
        self._peers = peers
        self._homes = homes
        self._file = file
        self._line = line
        self._failures = failures
        self._offsets: dict[int, int] = {}
        self._num_claimed_nbytes = 0
        self._last: dict[int, tuple[int, Request]] = {}
        self._num_started = 0
        self._thread: threading.Thread | None = None
        self._copies = _Copies(resources)
        for home in homes:
            if home.numel():
                resources.arena.adopt(home, "working")
        self._stop = weakref.finalize(self, self._copies.coming.put, None)

    def has(self, chunk_id: int) -> bool:
        """Return whether a chunk's shards are read where they live."""
        return chunk_id in self._offsets

    def claim(self, chunk_id: int, nbytes: int) -> MemorySource:
        """Return where a chunk's home finds its memory; see SharedHomes.claim."""
        self._offsets[chunk_id] = self._num_claimed_nbytes
        self._num_claimed_nbytes += nbytes
        return _HomeSource(self._file)

    def readers_of(self, chunk_id: int) -> HomeReaders:
        """Return the ranks that read a chunk's home."""
        return _Readers(self, chunk_id)

    def gather(self, chunk_id: int, whole: torch.Tensor, *, name: str) -> _PendingGather:
        """Start copying the other ranks' shards of a chunk; see SharedHomes.gather."""
        request = self._failures.note("gather", name)
        nbytes = whole.numel() // self._line.num_ranks
        begin = self._offsets[chunk_id]
        alias = alias_of(whole) if whole.device.type in ("cpu", "cuda") else whole
        shards = [
            _Shard(peer, home[begin : begin + nbytes], alias[place * nbytes : (place + 1) * nbytes])
            for place, (peer, home) in enumerate(zip(self._peers, self._homes, strict=True))
            if place != self._line.place
        ]
        gather = _Gather(self._num_started, request, shards, self._copies.resources.transfers.mark())
        self._last[chunk_id] = (gather.number, request)
        self._num_started += 1
        with self._failures.failing(request, self._line):
            page = self._peers[self._line.place].page
            page.offer(gather.number)
            if self._thread is None:
                arguments = (self._copies, page)
                self._thread = threading.Thread(target=_serve, args=arguments, name="gemini-gathers", daemon=True)
                self._thread.start()
        self._copies.coming.put(gather)
        return _PendingGather(self, gather)

    def await_readers(self, chunk_id: int) -> None:
        """Block until all ranks have read what they last gathered of a chunk."""
        number, request = self._last.get(chunk_id, (-1, None))
        if request is None or self._copies.is_closing:
            return
        with self._failures.failing(request, self._line):
            for peer in self._peers:
                self._await_reader(peer, number, request)

    def _await_reader(self, peer: Peer, number: int, request: Request) -> None:
        peer.wait_for(lambda: peer.page.has_read(number), look=lambda: self._failures.look(request, self._line))

    def close(self) -> None:
        """End the thread, tell the other ranks and let go of them. Idempotent."""
        if not self._stop.alive:
            return
        self._copies.is_closing = True
        self._stop()
        if self._thread is not None:
            self._thread.join()
        self._peers[self._line.place].page.leave()  # now that it reads no more: whoever waits for it does so in vain
        for home in self._homes:
            if home.numel():
                self._copies.resources.arena.free(home)
        for peer in self._peers:
            peer.close()
        self._homes, self._peers = (), ()


class _HomeSource:
    """A home's memory, the next part of the rank's file."""

    is_lockable = True

    def __init__(self, file: MemoryFile) -> None:
        self._file = file

    def take(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] of the file."""
        part = self._file.take(nbytes)
        self._file.reserve(part)
        return part.view


class _Readers:
    """Those who read one chunk's home; see HomeReaders."""

    def __init__(self, weights: HostWeights, chunk_id: int) -> None:
        self._weights = weights
        self._chunk_id = chunk_id

    def wait(self) -> None:
        """Block until nobody reads the home any more."""
        self._weights.await_readers(self._chunk_id)


class _PendingGather:
    """One gather, as the training thread sees it; see Collective."""

    def __init__(self, weights: HostWeights, gather: _Gather) -> None:
        self._failures = weights._failures
        self._line = weights._line
        self._gather = gather

    def wait(self) -> None:
        """Let compute that is submitted from now on see all shards; blocks until their copies have started."""
        gather = self._gather
        with self._failures.failing(gather.request, self._line):
            while not gather.are_started.wait(LOOK_S):
                self._failures.look(gather.request, self._line)
            if gather.error is not None:
                raise gather.error
        for move in gather.moves:
            if isinstance(move, Ticket):
                move.wait()
            else:
                move.wait_on_compute()


def _serve(copies: _Copies, page: RankPage) -> None:
    """Start the copies of gathers until None comes; after a failure none is started. `page` is this rank's."""
    failure: Exception | None = None
    while (gather := copies.coming.get()) is not None:
        try:
            if failure is None:
                _copy(copies, gather)
                gather.shards = ()
                gather.are_started.set()
                _wait_for(gather)
                page.note_read(gather.number)
        except Exception as error:
            failure = error
            with suppress(Exception):  # the slot will be given to others
                _wait_for(gather)
            page.leave()
        gather.error = failure
        gather.are_started.set()
        del gather  # it refers to a slot


def _wait_for(gather: _Gather) -> None:
    """Block until the copies that were started have ended."""
    for move in gather.moves:
        if isinstance(move, Ticket):
            move.wait()
        else:
            move.wait_on_host()


def _copy(copies: _Copies, gather: _Gather) -> None:
    """Start the copies of one gather, each when its rank lets its home be read."""

    def look() -> None:
        if copies.is_closing:
            raise RuntimeError("this rank closes its engine")

    resources, record = copies.resources, gather.request.what
    for shard in gather.shards:
        page = shard.peer.page
        shard.peer.wait_for(lambda page=page: page.has_offered(gather.number), look=look)  # type: ignore[misc]
        if resources.transfers.compute_tier is MemoryTier.HOST:
            gather.moves.append(resources.pool.submit_copy(shard.into, shard.home, record=record))
        else:
            gather.moves.append(resources.transfers.upload(shard.into, shard.home, after=gather.mark, record=record))
