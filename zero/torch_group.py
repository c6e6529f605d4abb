"""The ranks of a torch.distributed process group, as gemini.chunk.sharding.ShardGroup wants them.

Two collectives are used: an all-gather for weights and values, and an all-to-all for gradients, which the receiver adds
up itself. Everything travels as bytes.

[Note: When a rank is lost]
Backends say that a connection broke or that time ran out, not who was awaited by whom for what. So whoever fails
writes to the group's store what it was waiting for, looks for a moment who else does, and names those that are silent.
The first failure stays: every later call raises at once.
"""

from __future__ import annotations

import ctypes
import logging
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from gemini.chunk.sharding import ChunkShard
from gemini.errors import CollectiveError
from gemini.offload.store import remove_abandoned
from gemini.offload.transfer import Move
from zero.sharding import shard_of

__all__ = ["TorchGroup"]

logger = logging.getLogger(__name__)

REPORT_S = 2.0
"""Seconds in which other ranks may report the same failure before they are called silent."""


class TorchGroup:
    """A process group and the failures of its collectives.

    Args:
        group: NCCL for CUDA devices, gloo for the CPU; None: the default group. Not destroyed here.
        device: where chunks are gathered.
        swap_directory: where the ranks of this machine have their swap files; those of ranks that have died are removed
            when the group is closed after a failure.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, device: torch.device, *, swap_directory: Path | None = None
    ) -> None:
        self._group = group
        self._swap_directory = swap_directory
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        self._values_device = torch.device("cpu") if dist.get_backend(group) == "gloo" else device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._trail = 0  # checksum of all collectives so far
        self._num_collectives = 0
        self._failure: str | None = None

    @property
    def rank(self) -> int:
        """This process's place in the group, from 0."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of processes in the group."""
        return self._world_size

    def shard_of(self, numel: int, itemsize: int) -> ChunkShard:
        """Return this rank's shard of a chunk; see zero.sharding."""
        return shard_of(numel, itemsize, rank=self._rank, world_size=self._world_size)

    # ---------------------------------------------------------------- collectives

    def all_gather(self, whole: torch.Tensor, *, name: str, after: Sequence[Move] = ()) -> _PendingCollective:
        """Start filling a buffer with the shards of all ranks, in place.

        Args:
            whole: uint8 [world_size * n]; holds this rank's n bytes in their place.
            name: what is gathered, for messages.
            after: copies into `whole` under way.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """
        what = self._note("all-gather", name)
        nbytes = whole.numel() // self._world_size
        alias = alias_of(whole)
        own = alias[self._rank * nbytes : (self._rank + 1) * nbytes]
        with self._failing(what), self._behind(after):
            return _PendingCollective(self, what, _start_all_gather(alias, own, self._group))

    def exchange(self, sent: torch.Tensor, received: torch.Tensor, *, name: str) -> _PendingCollective:
        """Start sending each rank its part of a buffer, and receiving this rank's part of everyone's.

        Args:
            sent: uint8 [world_size * n], the parts in rank order; unchanged until the result has been waited for.
            received: as many bytes; overwritten.
            name: what is exchanged, for messages.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """
        what = self._note("all-to-all", name)
        with self._failing(what), self._behind(()):
            work = dist.all_to_all_single(alias_of(received), alias_of(sent), group=self._group, async_op=True)
            return _PendingCollective(self, what, work)

    def gather_values(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return everyone's values, and make sure that all ranks have come the same way; blocks.

        Args:
            values: [n] on the CPU, of any dtype.
            name: what is gathered, for messages.

        Returns:
            [world_size, n] on the CPU.

        Raises:
            CollectiveError: a rank has died, stalled or gone another way.
        """
        what = self._note("all-gather", name)
        trail = torch.tensor([self._trail, self._num_collectives], dtype=torch.int64)
        message = torch.cat([trail.view(torch.uint8), values.contiguous().view(torch.uint8)])
        gathered = message.new_empty(self._world_size * message.numel(), device=self._values_device)
        with self._failing(what):
            _start_all_gather(gathered, message.to(self._values_device), self._group).wait()
            rows = gathered.cpu().view(self._world_size, message.numel())
        trails = rows[:, : trail.nbytes].contiguous().view(torch.int64)
        others = [rank for rank in range(self._world_size) if not torch.equal(trails[rank], trail)]
        if others:
            counts = ", ".join(f"rank {rank} {int(trails[rank, 1])}" for rank in range(self._world_size))
            self._failure = (
                f"{what}: rank {self._rank} and rank {others[0]} have not asked for the same collectives (so far: "
                f"{counts}): all ranks must run the same units in the same order, evaluation and saving included"
            )
            raise CollectiveError(self._failure)
        return rows[:, trail.nbytes :].contiguous().view(values.dtype)

    def _note(self, kind: str, name: str) -> str:
        """Add a collective to the trail; return what to call it."""
        self.check()
        what = f"{kind} of {name}"
        self._trail = zlib.crc32(what.encode(), self._trail)
        self._num_collectives += 1
        return what

    @contextmanager
    def _behind(self, moves: Sequence[Move]) -> Iterator[None]:
        """Issue what follows behind copies under way and compute submitted so far, without holding up compute."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for move in moves:
                move.wait_on_compute()
            yield

    # ---------------------------------------------------------------- failure

    def check(self) -> None:
        """Raise CollectiveError if a collective has failed."""
        if self._failure is not None:
            raise CollectiveError(f"this group has failed before: {self._failure}")

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turn a backend's error into one that names the collective and the ranks."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, CollectiveError):
                raise
            self.check()
            self._failure = self._describe(what, error)
            raise CollectiveError(self._failure) from error

    def _describe(self, what: str, error: RuntimeError) -> str:
        reason = str(error).splitlines()[0].split(". This ")[0]
        return (
            f"{what} failed on rank {self._rank} of {self._world_size}: {self._find_silent(what)}; the backend says: "
            f"{reason}. Start all ranks again, from a checkpoint"
        )

    def _find_silent(self, what: str) -> str:
        """Tell the others of a failure through the store, and return who does not tell of one."""
        silent = set(range(self._world_size)) - {self._rank}
        try:
            store = PrefixStore("zero-failure", dist.distributed_c10d._get_default_store())
            store.set_timeout(timedelta(seconds=REPORT_S))
            store.set(f"{self._rank}", what)
            deadline_s = time.monotonic() + REPORT_S
            while silent and time.monotonic() < deadline_s:
                silent -= {rank for rank in silent if store.check([f"{rank}"])}
                time.sleep(0.05)
        except RuntimeError:
            return "the process that holds the group's store is gone"
        if not silent:
            return "a connection was lost, but all ranks are there"
        return f"no word from rank {', '.join(map(str, sorted(silent)))}, which has died or stalled"

    def close(self) -> None:
        """Let go of the process group, which its owner destroys, and clear up after ranks that have died."""
        if self._failure is None:
            self._failure = "it is closed"
        elif self._swap_directory is not None:
            for path in remove_abandoned(self._swap_directory):
                logger.info("removed %s, whose rank has died", path)
        self._swap_directory = None


class _PendingCollective:
    """One collective under way."""

    def __init__(self, group: TorchGroup, what: str, work: dist.Work) -> None:
        self._group = group
        self._what = what
        self._work: dist.Work | None = work

    def wait(self) -> None:
        """Make compute submitted from now on see the result; on the CPU, block until it is there.

        Raises:
            CollectiveError: a rank has died or stalled.
        """
        work, self._work = self._work, None
        if work is not None:
            with self._group._failing(self._what):
                work.wait()


class _CudaMemory:
    """Device memory, described as numba and others do."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def alias_of(buffer: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same bytes with a storage of its own, which does not keep them alive.

    Whether a slot may be evicted depends on who else refers to its storage, and a collective may do so for a moment
    after it has ended: not the same moment on all ranks.

    Args:
        buffer: uint8 [n], contiguous; outlives the alias.

    Returns:
        uint8 [n].
    """
    if buffer.is_cuda:
        return torch.as_tensor(_CudaMemory(buffer), device=buffer.device)
    memory = (ctypes.c_uint8 * buffer.numel()).from_address(buffer.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8)


def _start_all_gather(gathered: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Start an all-gather under the name it has in this version of torch."""
    start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work = start(gathered, own, group=group, async_op=True)
    return work
