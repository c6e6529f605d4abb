"""The length and layout of a commit file, and whether an engine can have one; before anything is allocated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemini.chunk.layout import ChunkLayout
from gemini.commits.file import CommitLayout
from gemini.errors import ConfigError
from gemini.kernels.journal import BLOCK_NUMEL
from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape, largest_buffers
from gemini.ranks.sharding import ChunkShard
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, TileGrid, format_nbytes, round_up

__all__ = ["CommitContent", "lay_out_buffers", "lay_out_overhead", "refuse_device_homes"]

BASE_RECORD_NBYTES = 1 << 20
"""For random numbers, the scheduler, and what the user gives to be kept."""
PARAM_RECORD_NBYTES = 1 << 10
"""For each parameter's name, group and segments, and its chunk's place in the trace."""


def lay_out_overhead(
    demands: Sequence[ChunkDemand], *, tile_numel: int, num_params: int, model_buffer_nbytes: int, num_scratches: int
) -> CommitLayout:
    """Lay out all of a commit file but the buffers, whose size depends on the plan.

    Args:
        demands: the chunks.
        tile_numel: elements in a tile.
        num_params: parameters of the model.
        model_buffer_nbytes: bytes of the model's persistent buffers, which every record holds.
        num_scratches: worker threads there may be.

    Returns:
        The layout, with no buffers.
    """
    numels = [demand.numel for demand in demands if demand.is_trainable]
    record_nbytes = BASE_RECORD_NBYTES + PARAM_RECORD_NBYTES * num_params + 2 * model_buffer_nbytes
    return CommitLayout(
        record_nbytes=round_up(record_nbytes, IO_ALIGNMENT_NBYTES),
        num_blocks=max(1, sum(-(-numel // BLOCK_NUMEL) for numel in numels)),
        num_words=max(1, sum(TileGrid(numel, tile_numel).num_tiles for numel in numels)),
        num_scratches=num_scratches,
        buffer_nbytes=0,
    )


def lay_out_buffers(demands: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape) -> int:
    """Return the bytes of the homes of trainable chunks in host memory and of the update ring.

    Args:
        demands: the chunks, by id.
        plan: their homes.
        shape: sizes of the buffers.

    Returns:
        Whole pages.
    """
    total = shape.ring_depth * largest_buffers(demands, plan, shape)["update ring"]
    for demand, homes in zip(demands, plan.chunks, strict=True):
        if homes.grad is None:
            continue
        for tile in range(demand.num_tiles(shape.tile_numel)):
            length = demand.tile_length(tile, shape.tile_numel)
            if homes.working[tile] is MemoryTier.HOST:
                total += round_up(length * demand.working_itemsize, IO_ALIGNMENT_NBYTES)
            if homes.state[tile] is MemoryTier.HOST:
                total += demand.state_tile_nbytes(tile, shape.tile_numel)
            if homes.grad is MemoryTier.HOST:
                total += round_up(length * demand.grad_itemsize(shape), IO_ALIGNMENT_NBYTES)
    return total


def refuse_device_homes(layout: ChunkLayout, plan: PlacementPlan) -> None:
    """Raise ConfigError if a trainable chunk is at home on the device, whose memory ends with the process."""
    for chunk, homes in zip(layout.chunks, plan.chunks, strict=True):
        if homes.grad is not None and _lives_on_device(homes):
            raise ConfigError(
                f"commits: {chunk.name} is trainable and at home on the device, whose memory ends with the process: "
                'keep it in host memory or on disk, with placement="auto", or with a StaticPlacement whose '
                "param_device and state_device are 0"
            )


def _lives_on_device(homes: ChunkPlacement) -> bool:
    return MemoryTier.DEVICE in (*homes.working, *homes.state, homes.grad)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitContent:
    """The content of an engine's commit file and of the swap file that belongs to it."""

    layout: ChunkLayout
    shards: tuple[ChunkShard | None, ...]
    """The shard of each chunk that lives here, by chunk id; None: all of it."""
    plan: PlacementPlan
    shape: RuntimeShape
    commits: CommitLayout
    numels: Mapping[int, int]
    """Elements of each trained chunk's homes, by chunk id."""

    def fingerprint(self) -> str:
        """Return what differs between engines that would find different things in one file: 64 hexadecimal digits."""
        homes = [(chunk.working, chunk.state, chunk.grad) for chunk in self.plan.chunks]
        numbers = (self.shape.tile_numel, self.shape.ring_depth, self.shape.grad_itemsize)
        described = (self.layout.chunks, self.shards, homes, numbers, self.commits)
        return hashlib.sha256(repr(described).encode()).hexdigest()

    def describe(self) -> str:
        """Return the same in words."""
        chunks = self.layout.chunks
        numel = sum(
            chunk.numel for chunk, homes in zip(chunks, self.plan.chunks, strict=True) if homes.grad is not None
        )
        tiers = [tier for homes in self.plan.chunks for tier in homes.state]
        on_disk = tiers.count(MemoryTier.NVME) / max(len(tiers), 1)
        dtypes = ", ".join(sorted({str(chunk.dtype).removeprefix("torch.") for chunk in chunks}))
        return (
            f"{numel} trained elements in {len(chunks)} chunks, {dtypes}, tiles of {self.shape.tile_numel}, "
            f"{on_disk:.0%} of the state on disk, {format_nbytes(self.commits.buffer_nbytes)} in the file"
        )
