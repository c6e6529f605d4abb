"""Memory files that ranks of a machine have in common: how each learns where the others' are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from gemini.offload.memory_file import MemoryFile, MemoryFileAddress
from gemini.ranks.sharding import ShardGroup

__all__ = ["NOWHERE", "gather_addresses"]

NOWHERE = MemoryFileAddress(pid=-1, descriptor=-1, inode=-1)
"""Address of a file that there is not."""


def gather_addresses(file: MemoryFile | None, group: ShardGroup, *, name: str) -> Mapping[int, MemoryFileAddress]:
    """Return the addresses of all ranks' files; all ranks call.

    Args:
        file: this rank's; None if it has none.
        group: the ranks.
        name: name of the files' content, for messages.

    Returns:
        Address by rank; NOWHERE for ranks that have no file.

    Raises:
        CollectiveError: a rank did not take part.
    """
    own = dataclasses.astuple(NOWHERE if file is None else file.address)
    table = group.gather_values(torch.tensor(own, dtype=torch.int64), name=f"addresses of {name}").tolist()
    return {
        rank: MemoryFileAddress(pid=pid, descriptor=descriptor, inode=inode)
        for rank, (pid, descriptor, inode) in zip(group.ranks, table, strict=True)
    }
