"""The choice of where gradients and weights of ranks meet, and the memory files for those that do in host memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from gemini.config import GeminiConfig
from gemini.errors import ConfigError
from gemini.offload.memory_file import MemoryFile
from gemini.offload.resources import Resources
from gemini.ranks.sharding import HostExchange, RankAxis
from gemini.tiers import IO_ALIGNMENT_NBYTES
from zero.host_pages import Peer, PeerProcess
from zero.host_sums import PURPOSE, MeetingSums
from zero.host_weights import HostWeights
from zero.memory_files import NOWHERE, gather_addresses
from zero.own_groups import timeout_of
from zero.torch_group import TorchGroup

__all__ = ["HostMeeting", "choose_host_memory", "lacks_peer_access"]

logger = logging.getLogger(__name__)

Identity = tuple[int, int]
"""What tells a GPU from all others, in every process."""


class HostMeeting:
    """Memory files of all ranks of a shard axis, one each; see HostMemory.

    Args:
        group: the ranks.
        files: the file of each rank of the axis, in rank order, and its process.
    """

    def __init__(self, group: TorchGroup, files: Sequence[tuple[MemoryFile, PeerProcess]]) -> None:
        self._group = group
        self._files = files

    def open(self, resources: Resources, *, num_slots: int, slot_nbytes: int, homes_nbytes: int) -> HostExchange:
        """Take this rank's slots and homes, and map those of the others; see HostMemory.open."""
        group, line = self._group, self._group.line(RankAxis.SHARD)
        num_slots = num_slots if slot_nbytes else 0
        nbytes = IO_ALIGNMENT_NBYTES + num_slots * slot_nbytes
        timeout_s = timeout_of(line.data).total_seconds()
        peers, homes = [], []
        for rank, (file, process) in zip(line.ranks, self._files, strict=True):
            file.lay_out(nbytes + homes_nbytes, is_read_in_place=False)
            is_own = rank == group.rank
            memory = (resources.arena.take_shared(file, nbytes, PURPOSE) if is_own else file.take(nbytes)).view
            peers.append(Peer(rank, process, memory, page_nbytes=IO_ALIGNMENT_NBYTES, timeout_s=timeout_s))
            is_empty = is_own or not homes_nbytes  # its own are taken one by one
            homes.append(memory[:0] if is_empty else file.take(homes_nbytes).view)
        sums = MeetingSums(peers, line, group.failures, resources, num_slots=num_slots, slot_nbytes=slot_nbytes)
        file = self._files[line.place][0]
        return HostExchange(sums, HostWeights(peers, homes, file, line, group.failures, resources))

    def seal(self) -> None:
        """Forbid further mappings of this rank's file, once all ranks have mapped it."""
        for file, _ in self._files:
            file.seal()

    def close(self) -> None:
        """Close the files; what was opened remains."""
        for file, _ in self._files:
            file.close()


def choose_host_memory(config: GeminiConfig, node_ranks: Sequence[int], group: TorchGroup) -> HostMeeting | None:
    """Decide where gradients meet, the same on all ranks, and prepare the memory; all ranks call.

    Args:
        config: the configuration, the same on all ranks.
        node_ranks: ranks of this machine, including this one.
        group: the ranks.

    Returns:
        The memory; None: collectives exchange gradients.

    Raises:
        ConfigError: host memory was asked for, and ranks that chunks are cut over are on several machines or cannot
            see each other's memory.
        CollectiveError: a rank did not take part.
    """
    if config.exchange == "collective" or (config.exchange == "auto" and group.device.type != "cuda"):
        return None
    line = group.line(RankAxis.SHARD)
    is_near = set(line.ranks) <= set(node_ranks)
    is_wanted = config.exchange == "host" or _lacks_peer_access(group)
    own = torch.tensor([is_near, is_wanted], dtype=torch.int64)
    near, wanted = group.gather_values(own, name="places of gradients' exchange").bool().unbind(dim=1)
    if not near.all():
        if config.exchange == "auto":
            return None
        far = [rank for rank, each in zip(group.ranks, near.tolist(), strict=True) if not each]
        raise ConfigError(
            f'GeminiConfig.exchange: "host" is for ranks of one machine, and the ranks that share chunks with rank '
            f'{far[0]} are on several: choose "collective", or give zero.shard a mesh of two dimensions, (replicate, '
            "shard), whose rows are machines"
        )
    if not wanted.any():
        return None
    meeting = _open_meeting(group)
    if meeting is None and config.exchange == "host":
        raise ConfigError(
            'GeminiConfig.exchange: "host" needs ranks that see each other\'s memory files, and they do not (a warning '
            'says why): start them as one user in one container, or choose "collective"'
        )
    return meeting


def _open_meeting(group: TorchGroup) -> HostMeeting | None:
    """Make a memory file, open those of the others and watch these; None on all ranks if one cannot."""
    files: dict[int, tuple[MemoryFile, PeerProcess]] = {}
    own = None
    try:
        own = MemoryFile.create()
    except OSError as error:
        _warn(group.rank, error)
    addresses = gather_addresses(own, group, name="gradients' memory")
    try:
        for rank in group.line(RankAxis.SHARD).ranks:
            address = addresses[rank]
            if address != NOWHERE:
                process = PeerProcess(address.pid)
                files[rank] = (own if rank == group.rank and own is not None else MemoryFile.open(address), process)
    except OSError as error:
        _warn(group.rank, error)
    meeting = HostMeeting(group, list(files.values()))
    has_all = torch.tensor([len(files) == group.line(RankAxis.SHARD).num_ranks], dtype=torch.int64)
    if group.gather_values(has_all, name="users of gradients' memory").all():
        return meeting
    meeting.close()
    if own is not None:
        own.close()
    return None


def _warn(rank: int, error: OSError) -> None:
    logger.warning("gradients do not meet in host memory: rank %d cannot have the memory: %s", rank, error)


def _lacks_peer_access(group: TorchGroup) -> bool:
    """Return whether this rank's GPU cannot reach the memory of another's; all ranks call."""
    visible = {_identity_of(index): index for index in range(torch.cuda.device_count())}
    index = torch.cuda.current_device() if group.device.index is None else group.device.index
    own = torch.tensor(_identity_of(index), dtype=torch.int64)
    found = [(first, second) for first, second in group.gather_values(own, name="devices").tolist()]
    line = group.line(RankAxis.SHARD)
    others = [found[group.ranks.index(rank)] for rank in line.ranks if rank != group.rank]
    return lacks_peer_access(index, others, visible, torch.cuda.can_device_access_peer)


def _identity_of(index: int) -> Identity:
    """Return what tells a GPU from all others: a digest of its UUID, as two numbers."""
    digest = hashlib.sha256(str(torch.cuda.get_device_properties(index).uuid).encode()).digest()
    first, second = (int.from_bytes(digest[begin : begin + 8], "little", signed=True) for begin in (0, 8))
    return first, second


def lacks_peer_access(
    own: int, others: Sequence[Identity], visible: Mapping[Identity, int], can_access: Callable[[int, int], bool]
) -> bool:
    """Return whether a GPU cannot reach the memory of one of others.

    Args:
        own: the GPU's index in this process.
        others: identities of the others.
        visible: index in this process by identity. Whether one that is hidden here can be reached is not known, and it
            counts as reachable.
        can_access: returns whether the GPU of one index can reach the memory of another's.

    Returns:
        The answer.
    """
    indices = {visible[other] for other in others if other in visible} - {own}
    return any(not can_access(own, index) for index in indices)
