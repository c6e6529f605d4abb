"""How many bytes a step moves over each link under a plan, and how long that takes at least.

A lower bound for finding the bottleneck, not a simulation: links work at the same time, each at its full rate, and a
chunk without a residence is fetched once for forward and once for backward.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape
from gemini.tiers import MemoryTier

__all__ = ["Channel", "HardwareProfile", "StepPrediction", "predict_step"]


class Channel(enum.Enum):
    """Links that bytes of a step cross."""

    H2D = "h2d"
    """Host memory to the device: weights for forward and backward, and what the update changed of residents."""
    D2H = "d2h"
    """Device to host memory: gradients in the working dtype."""
    HOST_MEMORY = "host memory"
    """Reads and writes of the update that the processor makes: state and working weights both ways, gradients once."""
    NVME_READ = "nvme read"
    """Weights for forward and backward; weights, state and gradients for the update."""
    NVME_WRITE = "nvme write"
    """Gradients; weights and state after the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Measured rates, in bytes per second."""

    h2d_rate: float
    d2h_rate: float
    host_memory_rate: float
    nvme_read_rate: float
    nvme_write_rate: float

    def rate(self, channel: Channel) -> float:
        """Return a channel's rate."""
        return {
            Channel.H2D: self.h2d_rate,
            Channel.D2H: self.d2h_rate,
            Channel.HOST_MEMORY: self.host_memory_rate,
            Channel.NVME_READ: self.nvme_read_rate,
            Channel.NVME_WRITE: self.nvme_write_rate,
        }[channel]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """What one forward, backward and update move."""

    nbytes: dict[Channel, int]
    seconds: dict[Channel, float]

    @property
    def bottleneck(self) -> Channel:
        """The channel that takes longest; the first of them in the order of `Channel` among equals."""
        return max(Channel, key=lambda channel: self.seconds[channel])


def predict_step(
    chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape, profile: HardwareProfile
) -> StepPrediction:
    """Predict the bytes and the least time of one step on each channel.

    Args:
        chunks: the chunks, by id.
        plan: their homes.
        shape: sizes of the buffers.
        profile: rates of the links.

    Returns:
        Bytes and seconds per channel, padding of records included as far as it crosses the link.
    """
    nbytes = dict.fromkeys(Channel, 0)
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        for channel, moved in _chunk_nbytes(demand, homes, shape).items():
            nbytes[channel] += moved
    return StepPrediction(
        nbytes=nbytes, seconds={channel: moved / profile.rate(channel) for channel, moved in nbytes.items()}
    )


def _chunk_nbytes(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> dict[Channel, int]:
    nvme, device = MemoryTier.NVME, MemoryTier.DEVICE
    working_nvme = _nbytes_in(nvme, homes.working, demand.working_tile_nbytes, shape)
    state_nvme = _nbytes_in(nvme, homes.state, demand.state_tile_nbytes, shape)
    state_nbytes = sum(_nbytes_in(tier, homes.state, demand.state_tile_nbytes, shape) for tier in MemoryTier)
    grad_nbytes = demand.numel * shape.grad_itemsize
    grad_nvme = grad_nbytes if homes.grad is nvme else 0
    num_fetches = 0 if homes.is_resident else 2
    is_updated_below = demand.is_trainable and device not in homes.state
    num_updates = 1 if is_updated_below else 0
    moved = {
        Channel.HOST_MEMORY: num_updates * (2 * state_nbytes + 2 * demand.working_nbytes + grad_nbytes),
        Channel.NVME_READ: (num_fetches + num_updates) * working_nvme + state_nvme + grad_nvme,
        Channel.NVME_WRITE: num_updates * working_nvme + state_nvme + grad_nvme,
    }
    if shape.has_device:
        num_refreshes = num_updates if homes.is_resident else 0
        moved[Channel.H2D] = (num_fetches + num_refreshes) * demand.working_nbytes
        moved[Channel.D2H] = num_updates * demand.working_nbytes
    return moved


def _nbytes_in(
    tier: MemoryTier, homes: tuple[MemoryTier, ...], tile_nbytes: Callable[[int, int], int], shape: RuntimeShape
) -> int:
    if tier not in homes:
        return 0
    last = len(homes) - 1
    num_full = homes[:last].count(tier)
    return num_full * tile_nbytes(0, shape.tile_numel) + (homes[last] is tier) * tile_nbytes(last, shape.tile_numel)
