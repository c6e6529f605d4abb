"""An implementation of gemini.ranks.sharding.ShardGroup on torch.distributed process groups.

Two collectives are used: an all-gather for weights and values, and an all-to-all for gradients, which the receiver adds
up. Everything is sent as bytes. Each axis of the grid of ranks has a process group; values that all ranks must know are
gathered along one axis after the other. What becomes of failures is in zero.failures.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gemini.offload.swap_file import remove_abandoned
from gemini.offload.transfer import Move
from gemini.ranks.sharding import ChunkShard, RankAxis, RankGrid
from zero.failures import SAME_WAY, Failures
from zero.own_groups import Line, alone, line_of
from zero.request_log import LOOK_S, Request
from zero.sharding import shard_of

__all__ = ["TorchGroup"]

logger = logging.getLogger(__name__)

_num_groups: Counter[tuple[int, ...]] = Counter()
"""Number of groups that this process has made of the same ranks; each has its own board."""


class TorchGroup:
    """The process groups that share one model, and the failures of their collectives.

    Args:
        shards: group of the ranks that together hold one replica of the model. NCCL for CUDA devices, gloo for the CPU;
            None: the default group. Not destroyed here.
        device: device on which chunks are gathered.
        replicas: group of the ranks that hold the same shard; None if there is one replica.
        tensor_ranks: group of the ranks among which parameters are divided first; None if they are not.
        swap_directory: directory of this machine's swap files; those of dead ranks are removed when the group is closed
            after a failure.

    Raises:
        CollectiveError: a rank did not take part.
    """

    def __init__(
        self,
        shards: dist.ProcessGroup | None,
        device: torch.device,
        *,
        replicas: dist.ProcessGroup | None = None,
        tensor_ranks: dist.ProcessGroup | None = None,
        swap_directory: Path | None = None,
    ) -> None:
        self.device = device
        # - The grid of ranks
        self._lines = {RankAxis.SHARD: line_of(shards)}
        if replicas is not None:
            self._lines[RankAxis.REPLICA] = line_of(replicas)
        if tensor_ranks is not None:
            self._lines[RankAxis.TENSOR] = line_of(tensor_ranks)
        self._rank = dist.get_rank()
        # - Where collectives run
        self._values_device = torch.device("cpu") if dist.get_backend(shards) == "gloo" else device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # - Failures and their report
        self._swap_directory = swap_directory
        self.failures = Failures(self._rank, f"zero-new-{self._rank}", self._lines.values())
        own = torch.tensor([self._rank])
        request = Request(0, 0, "all-gather of numbers of ranks")
        self._ranks = tuple(self._collect(self._lines, own, request)[:, 0].tolist())
        self.failures.board = f"zero-{self._ranks}-{_num_groups[self._ranks]}"
        _num_groups[self._ranks] += 1

    @property
    def rank(self) -> int:
        """Number of this process among all processes, from 0."""
        return self._rank

    @property
    def grid(self) -> RankGrid:
        """The grid of ranks."""
        replicas, tensor_ranks = self.line(RankAxis.REPLICA), self.line(RankAxis.TENSOR)
        return RankGrid(
            num_shards=self._lines[RankAxis.SHARD].num_ranks,
            num_replicas=replicas.num_ranks,
            replica=replicas.place,
            num_tensor_ranks=tensor_ranks.num_ranks,
            tensor_rank=tensor_ranks.place,
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Numbers of all ranks that share the model: by tensor rank, then by replica, in the order of shards."""
        return self._ranks

    def line(self, axis: RankAxis) -> Line:
        """Return the ranks along an axis; one that the grid does not have is this rank's alone."""
        return self._lines.get(axis, alone())

    def shard_of(self, numel: int, itemsize: int) -> ChunkShard:
        """Return this rank's shard of a chunk; see zero.sharding."""
        line = self._lines[RankAxis.SHARD]
        return shard_of(numel, itemsize, rank=line.place, world_size=line.num_ranks)

    # ---------------------------------------------------------------- collectives

    def all_gather(
        self, whole: torch.Tensor, *, name: str, axis: RankAxis = RankAxis.SHARD, after: Sequence[Move] = ()
    ) -> _PendingCollective:
        """Start filling a buffer with the parts of all ranks of an axis, in place.

        Args:
            whole: uint8 [num_ranks * n]; holds this rank's n bytes in their place.
            name: name of the content, for messages.
            axis: the ranks that take part.
            after: running copies into `whole`.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """
        line, request = self._lines[axis], self.failures.note("all-gather", name)
        nbytes = whole.numel() // line.num_ranks
        alias = alias_of(whole)
        own = alias[line.place * nbytes : (line.place + 1) * nbytes]
        with self.failures.failing(request, line), self._behind(after):
            return _PendingCollective(self, request, line, _start_all_gather(alias, own, line.data))

    def exchange(
        self, sent: torch.Tensor, received: torch.Tensor, *, name: str, axis: RankAxis = RankAxis.SHARD
    ) -> _PendingCollective:
        """Start sending each rank of an axis its part of a buffer, and receiving this rank's part from each of them.

        Args:
            sent: uint8 [num_ranks * n], the parts in rank order; unchanged until the result has been awaited.
            received: as many bytes; overwritten.
            name: name of the content, for messages.
            axis: the ranks that take part.

        Returns:
            The operation.

        Raises:
            CollectiveError: the group has failed.
        """
        line, request = self._lines[axis], self.failures.note("all-to-all", name)
        with self.failures.failing(request, line), self._behind(()):
            work = dist.all_to_all_single(alias_of(received), alias_of(sent), group=line.data, async_op=True)
            return _PendingCollective(self, request, line, work)

    def gather_values(self, values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return the values of all ranks, after checking that all have made the same calls; blocks.

        Args:
            values: [n] on the CPU, of any dtype.
            name: name of the content, for messages.

        Returns:
            [num_tensor_ranks * num_replicas * num_shards, n] on the CPU, in the order of `ranks`.

        Raises:
            CollectiveError: a rank has died, stalled or called something else.
        """
        return self._gather_in_step(self._lines, values, name)

    def gather_along(self, axes: Sequence[RankAxis], values: torch.Tensor, *, name: str) -> torch.Tensor:
        """Return the values of the ranks along some axes; otherwise as `gather_values`.

        Args:
            axes: the axes.
            values: [n] on the CPU, of any dtype.
            name: name of the content, for messages.

        Returns:
            [num_ranks, n] on the CPU; along the first axis rows follow one another.

        Raises:
            CollectiveError: a rank has died, stalled or called something else.
        """
        return self._gather_in_step(axes, values, name)

    def _gather_in_step(self, axes: Iterable[RankAxis], values: torch.Tensor, name: str) -> torch.Tensor:
        """Return the values of the ranks along some axes, after checking that all have made the same calls.

        The check goes first, in messages of one size, so that it cannot be mistaken for anything else.
        """
        request = self.failures.note("all-gather", name)
        own = torch.tensor([self._rank, request.number, request.checksum, values.nbytes], dtype=torch.int64)
        found = own.view(1, -1)
        for axis in axes:
            found = self._collect([axis], found.reshape(-1), request).view(-1, own.numel())
            others = [int(other[0]) for other in found if not torch.equal(other[1:], own[1:])]
            if others:
                counts = ", ".join(f"rank {rank} {count}" for rank, count, *_ in found.tolist())
                self.failures.fail(
                    request,
                    f"rank {self._rank} and rank {others[0]} have called different collectives (so far: "
                    f"{counts}): {SAME_WAY}",
                )
        rows = self._collect(axes, values.contiguous().view(torch.uint8), request)
        return rows.contiguous().view(values.dtype)

    def _collect(self, axes: Iterable[RankAxis], values: torch.Tensor, request: Request) -> torch.Tensor:
        """Return the values of the ranks along some axes, [num_ranks, n], the first axis running fastest."""
        rows = values.view(1, -1)
        for line in [self._lines[axis] for axis in axes]:
            gathered = rows.new_empty(line.num_ranks * rows.numel(), device=self._values_device)
            with self.failures.failing(request, line):
                work = _start_all_gather(gathered, rows.view(-1).to(self._values_device), line.control)
                self._wait(work, request, line)
                rows = gathered.cpu().view(-1, values.numel())
        return rows

    def _wait(self, work: dist.Work, request: Request, line: Line) -> None:
        """Wait for a collective, and check from time to time whether the others will come."""
        if not line.is_own:
            work.wait()
            return
        while not has_ended(work, timedelta(seconds=LOOK_S)):
            self.failures.look(request, line)

    @contextmanager
    def _behind(self, moves: Sequence[Move]) -> Iterator[None]:
        """Issue a collective after running copies and compute submitted so far, without delaying compute."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for move in moves:
                move.wait_on_compute()
            yield

    # ---------------------------------------------------------------- failure

    def check(self) -> None:
        """Raise CollectiveError if a collective has failed."""
        self.failures.check()

    def close(self) -> None:
        """Release the process group, which its owner destroys, and remove swap files of dead ranks."""
        if not self.failures.has_failed:
            self.failures.close()
        elif self._swap_directory is not None:
            for path in remove_abandoned(self._swap_directory):
                logger.info("removed %s, whose rank has died", path)
        self._swap_directory = None


class _PendingCollective:
    """One running collective."""

    def __init__(self, group: TorchGroup, request: Request, line: Line, work: dist.Work) -> None:
        self._group = group
        self._request = request
        self._line = line
        self._work: dist.Work | None = work

    def wait(self) -> None:
        """Make compute that is submitted from now on wait for the result; on the CPU, block until it is complete.

        Raises:
            CollectiveError: a rank has died or stalled.
        """
        work, self._work = self._work, None
        if work is not None:
            with self._group.failures.failing(self._request, self._line):
                self._group._wait(work, self._request, self._line)


class _CudaMemory:
    """Device memory, described by the interface that numba and others use."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def alias_of(buffer: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same bytes with its own storage, which does not keep them alive.

    Whether a slot may be evicted depends on other references to its storage. A collective may hold one for a moment
    after it has ended, and this moment is not the same on all ranks.

    Args:
        buffer: uint8 [n], contiguous; outlives the alias.

    Returns:
        uint8 [n].
    """
    if buffer.is_cuda:
        return torch.as_tensor(_CudaMemory(buffer), device=buffer.device)
    memory = (ctypes.c_uint8 * buffer.numel()).from_address(buffer.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8)


def has_ended(work: dist.Work, timeout: timedelta) -> bool:
    """Wait for a collective at most so long.

    Args:
        work: the collective.
        timeout: maximum wait.

    Returns:
        Whether it has ended.

    Raises:
        RuntimeError: it has failed.
    """
    try:
        work.wait(timeout)
    except RuntimeError:  # it has failed, or time was up
        if not work.is_completed():
            return False
        work.wait()  # it may have ended well since: only this tells
    return True


def _start_all_gather(gathered: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Start an all-gather by the name it has in this version of torch."""
    start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work = start(gathered, own, group=group, async_op=True)
    return work
