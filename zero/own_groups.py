"""Process groups of our own, so that no collective of ours meets one of the user's, nor two kinds of ours each other.

[Note: Collectives that meet]
Backends match collectives by their order alone. On gloo, two that differ in size then give one rank a part of the
other's bytes, or end a process without an exception. So on gloo each line of ranks has two groups that nobody else
knows: one for weights and gradients, one for what is agreed, where a message of fixed size goes first and says what
follows. A rank that asks for something else than the others then waits in vain, which is found out in time; see watch.
NCCL has room for one group a device at a time, and gets none.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["Line", "alone", "forget", "line_of"]


@dataclass(frozen=True, slots=True)
class Line:
    """The ranks of one axis through this rank."""

    data: dist.ProcessGroup | None
    """For weights and gradients; None: all processes."""
    control: dist.ProcessGroup | None
    """For what is agreed."""
    place: int
    """This rank's, from 0."""
    ranks: tuple[int, ...]
    """Their numbers among all processes."""
    is_own: bool
    """Whether the groups are ours alone."""

    @property
    def num_ranks(self) -> int:
        """How many there are."""
        return len(self.ranks)


def alone() -> Line:
    """Return the line of an axis along which there are no others."""
    return Line(None, None, 0, (0,), is_own=False)


_pairs: dict[tuple[int, ...], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
"""Our groups by ranks: as engines come and go they are used again, because all ranks must make groups alike."""


def line_of(group: dist.ProcessGroup | None) -> Line:
    """Return the ranks of a group, with groups of our own if it is gloo's; all its ranks call.

    Args:
        group: any; None: all processes. Its timeout, if it is longer, becomes the default group's.

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
    """Let the next engine of the same ranks have new groups: in these, some may wait in vain."""
    if line.is_own:
        _pairs.pop(line.ranks, None)


def _is_gloo(group: dist.ProcessGroup | None) -> bool:
    group = group or dist.distributed_c10d._get_default_group()
    try:
        return bool(group._get_backend(torch.device("cpu")).name() == "gloo")
    except RuntimeError:  # it has none for the CPU
        return False


def _new_group(group: dist.ProcessGroup | None, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    made: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=_timeout_of(group), backend="gloo", use_local_synchronization=True
    )
    return made


def _timeout_of(*groups: dist.ProcessGroup | None) -> timedelta:
    """Return the shortest timeout of some groups."""
    whole = dist.distributed_c10d._get_default_group()
    backends = [each._get_backend(device) for each in (g or whole for g in groups) for device in each._device_types]
    timeout: timedelta = min(backend.options._timeout for backend in backends)
    return timeout


def _shorten_timeout(group: dist.ProcessGroup) -> None:
    """Let a group wait no longer than the default group; a mesh makes its groups with half an hour on gloo."""
    dist.distributed_c10d._set_pg_timeout(_timeout_of(group, None), group)
