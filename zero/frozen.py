"""One copy of frozen weights for the ranks of a machine: how the file is made and found by the other ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from gemini.offload.memory_file import MemoryFile
from gemini.ranks.sharding import ShardGroup
from zero.memory_files import NOWHERE, gather_addresses

__all__ = ["open_frozen_file"]

logger = logging.getLogger(__name__)


def open_frozen_file(node_ranks: Sequence[int], group: ShardGroup) -> MemoryFile | None:
    """Make a memory file on each machine in its first rank, and open it in that machine's other ranks.

    Either all ranks get a file or none does, so that all make the same plan.

    Args:
        node_ranks: the ranks of this machine, including this one, in the order of `group.ranks`.
        group: the ranks.

    Returns:
        The file; its bytes are divided among as many ranks as the machine with the fewest has. None: a rank is alone on
        its machine, or one cannot have the file, which is logged.

    Raises:
        CollectiveError: a rank did not take part.
    """
    file = None
    try:
        if group.rank == node_ranks[0]:
            file = MemoryFile.create()
    except OSError as error:
        _warn(group.rank, error)
    address = gather_addresses(file, group, name="frozen weights")[node_ranks[0]]
    try:
        if group.rank != node_ranks[0] and address != NOWHERE:
            file = MemoryFile.open(address)
    except OSError as error:
        _warn(group.rank, error)
    num_users = torch.tensor([0 if file is None else len(node_ranks)], dtype=torch.int64)
    fewest = int(group.gather_values(num_users, name="users of frozen weights").min())
    if file is None:
        return None
    if fewest < 2:
        file.close()
        return None
    file.num_users = fewest
    return file


def _warn(rank: int, error: OSError) -> None:
    logger.warning(
        "each rank keeps its own shards of frozen weights, because rank %d cannot use a common copy: %s", rank, error
    )
