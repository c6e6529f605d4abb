"""Separate process groups, so that no collective here meets one of the user's, and no two kinds here meet each other.

[Note: Collectives that meet]
Backends match collectives only by their order. On gloo, two that differ in size give one rank a part of the other's
bytes, or end a process without an exception. So on gloo each line of ranks has two private groups: one for weights and
gradients, and one for agreements, where a message of fixed size goes first and says what follows. A rank that asks for
something else than the others then waits without an answer, which is detected in time; see request_log. NCCL has room
for one group per device at a time, and gets no private ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["Line", "alone", "forget", "line_of", "timeout_of"]


@dataclass(frozen=True, slots=True)
class Line:
    """The ranks of one axis that contains this rank."""

    data: dist.ProcessGroup | None
    """Group for weights and gradients; None for all processes."""
    control: dist.ProcessGroup | None
    """Group for agreements."""
    place: int
    """Place of this rank, from 0."""
    ranks: tuple[int, ...]
    """Numbers of the ranks among all processes."""
    is_own: bool
    """Whether the groups are private."""

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


def alone() -> Line:
    """Return the line of an axis along which there are no others."""
    return Line(None, None, 0, (0,), is_own=False)


_pairs: dict[tuple[int, ...], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
"""Private groups by ranks. Later engines reuse them, because all ranks must make groups in the same order."""


def line_of(group: dist.ProcessGroup | None) -> Line:
    """Return the ranks of a group, with private groups if it is a gloo group; all its ranks call.

    Args:
        group: a process group; None: all processes. If its timeout is longer, it becomes the default group's.

    Returns:
        The line.
    """
    if group is not None:
        _shorten_timeout(group)
    ranks = tuple(dist.get_process_group_ranks(group))
    place = dist.get_rank(group)
    if len(ranks) == 1 or not _is_gloo(group):
        return Line(group, group, place, ranks, is_own=False)
    known = dist.distributed_c10d._world.pg_map
    if ranks not in _pairs or any(each not in known for each in _pairs[ranks]):
        _pairs[ranks] = (_new_group(group, ranks), _new_group(group, ranks))
    return Line(*_pairs[ranks], place, ranks, is_own=True)


def forget(line: Line) -> None:
    """Give the next engine of the same ranks new groups, because ranks may be stuck in the present ones."""
    if line.is_own:
        _pairs.pop(line.ranks, None)


def _is_gloo(group: dist.ProcessGroup | None) -> bool:
    group = group or dist.distributed_c10d._get_default_group()
    try:
        return bool(group._get_backend(torch.device("cpu")).name() == "gloo")
    except RuntimeError:  # the group has no backend for the CPU
        return False


def _new_group(group: dist.ProcessGroup | None, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    made: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout_of(group), backend="gloo", use_local_synchronization=True
    )
    return made


def timeout_of(*groups: dist.ProcessGroup | None) -> timedelta:
    """Return the shortest timeout of some groups; None stands for the group of all processes."""
    whole = dist.distributed_c10d._get_default_group()
    backends = [each._get_backend(device) for each in (g or whole for g in groups) for device in each._device_types]
    timeout: timedelta = min(backend.options._timeout for backend in backends)
    return timeout


def _shorten_timeout(group: dist.ProcessGroup) -> None:
    """Limit a group's timeout to the default group's; a mesh makes its gloo groups with half an hour."""
    dist.distributed_c10d._set_pg_timeout(timeout_of(group, None), group)
