"""How long a step takes under a plan: its work, the rates of the machine, and what runs at the same time.

A formula for finding the bottleneck, not a simulation; docs/cost_model.md explains it. Channels work side by side, each
at its full rate, but for compute and disk, which may slow each other down; latencies do not count.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemini.errors import ConfigError, MissingRateError
from gemini.placement.overlap import OverlapMode
from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape
from gemini.tiers import MemoryTier

__all__ = [
    "Channel",
    "HardwareProfile",
    "StepFlops",
    "StepPrediction",
    "StepWork",
    "Work",
    "count_step",
    "predict_step",
    "transformer_flops",
]


class Channel(str, enum.Enum):
    """What does the work of a step, each at a rate of its own."""

    COMPUTE = "compute"
    """Matrix products."""
    H2D = "h2d"
    """Host memory to the device: weights for forward and backward, and what the update changed of residents."""
    D2H = "d2h"
    """Device to host memory: gradients in the working dtype."""
    DEVICE_MEMORY = "device memory"
    """Gradients stored, and state and working weights updated, by the device where they live on it."""
    HOST_MEMORY = "host memory"
    """The same by the processor, for what lives below; without a device also what it copies into slots."""
    NVME = "nvme"
    """Weights for forward and backward, gradients, and what the update reads and writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An amount of work; bytes by link, and floating-point operations."""

    flops: float = 0.0
    h2d_nbytes: int = 0
    d2h_nbytes: int = 0
    device_memory_nbytes: int = 0
    """Read and written together, as for the host."""
    host_memory_nbytes: int = 0
    nvme_read_nbytes: int = 0
    nvme_written_nbytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    def __mul__(self, count: int) -> Work:
        return Work(**{name: getattr(self, name) * count for name in self.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """Floating-point operations of one optimizer step's matrix products, all its batches together."""

    forward: float
    backward: float
    """With what activation checkpointing computes again."""
    forward_nbytes: int = 0
    """Bytes that all other operations read and write in compute memory; 0 leaves them out."""
    backward_nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What one forward, backward and update have to do."""

    forward: Work
    backward: Work
    ahead: Work
    """The part of the update that the speculative overlap may start during backward."""
    rest: Work
    """The other part, which waits for the optimizer's step."""

    @property
    def update(self) -> Work:
        """Return all of the update."""
        return self.ahead + self.rest

    @property
    def total(self) -> Work:
        """Return everything."""
        return self.forward + self.backward + self.update


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """Measured rates, in floating-point operations and bytes per second; None for what there is not."""

    matrix_rates: Mapping[str, float]
    """Of matrix products on the compute device, by dtype: "float32", "bfloat16", "float16"."""
    host_memory_rate: float
    """Bytes read and written together, by all worker threads."""
    device_memory_rate: float | None = None
    h2d_rate: float | None = None
    d2h_rate: float | None = None
    both_ways_rate: float | None = None
    """Bytes to and from the device at once, both together. For people: the model takes the two not to share a link."""
    nvme_read_rate: float | None = None
    nvme_write_rate: float | None = None
    nvme_mixed_rate: float | None = None
    """As many bytes read as written at once, both together."""
    compute_share_beside_nvme: float | None = None
    """Rate of matrix products while the disk is busy, over their rate alone: where host memory and processors do both,
    they share. None: not known, and taken to be 1, as for the other one."""
    nvme_share_beside_compute: float | None = None
    """Rate of the disk while matrix products run, over its rate alone."""

    def seconds(self, work: Work, dtype: str) -> dict[Channel, float]:
        """Return the time that each channel needs for its part of some work.

        Args:
            work: the work.
            dtype: what matrix products are computed in.

        Returns:
            Seconds by channel.

        Raises:
            ConfigError: there is work for something whose rate is not known.
        """
        matrix_rate = self.matrix_rates.get(dtype)
        return {
            Channel.COMPUTE: _seconds(work.flops, matrix_rate, f"matrix products in {dtype}"),
            Channel.H2D: _seconds(work.h2d_nbytes, self.h2d_rate, "copies to the device"),
            Channel.D2H: _seconds(work.d2h_nbytes, self.d2h_rate, "copies from the device"),
            Channel.DEVICE_MEMORY: _seconds(work.device_memory_nbytes, self.device_memory_rate, "device memory"),
            Channel.HOST_MEMORY: _seconds(work.host_memory_nbytes, self.host_memory_rate, "host memory"),
            Channel.NVME: self._nvme_seconds(work.nvme_read_nbytes, work.nvme_written_nbytes),
        }

    def span(self, compute_s: float, nvme_s: float) -> float:
        """Return how long compute and disk take side by side: each at its share while both have work, then one alone.

        Args:
            compute_s: what compute takes alone.
            nvme_s: what the disk takes alone.

        Returns:
            Seconds; at least the longer of the two.
        """
        compute_share = self.compute_share_beside_nvme or 1.0
        nvme_share = self.nvme_share_beside_compute or 1.0
        both_s = min(compute_s / compute_share, nvme_s / nvme_share)
        return both_s + max(compute_s - compute_share * both_s, nvme_s - nvme_share * both_s)

    def _nvme_seconds(self, read_nbytes: int, written_nbytes: int) -> float:
        """Return the time a disk takes: both directions at once for as long as both have work, then one alone."""
        read_s = _seconds(read_nbytes, self.nvme_read_rate, "disk reads")
        write_s = _seconds(written_nbytes, self.nvme_write_rate, "disk writes")
        if not read_s or not write_s or self.nvme_read_rate is None or self.nvme_write_rate is None:
            return read_s + write_s
        both_nbytes = min(read_nbytes, written_nbytes)
        mixed_s = max(
            _seconds(2 * both_nbytes, self.nvme_mixed_rate, "disk reads and writes at once"),
            both_nbytes / min(self.nvme_read_rate, self.nvme_write_rate),  # neither is faster for being mixed
        )
        alone_s = max(
            (read_nbytes - both_nbytes) / self.nvme_read_rate, (written_nbytes - both_nbytes) / self.nvme_write_rate
        )
        return mixed_s + alone_s


def _seconds(amount: float, rate: float | None, what: str) -> float:
    if not amount:
        return 0.0
    if rate is None:
        raise MissingRateError(
            f"the hardware profile has no rate for {what}, which this plan needs: call "
            "gemini.measure_hardware with the engine's own device= and, if it has one, its swap file's directory"
        )
    return amount / rate


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """How long a step should take."""

    step_s: float
    """From the start of forward to the end of the optimizer's step, in a row of equal steps."""
    seconds: dict[Channel, float]
    """How long each channel is busy."""
    bottleneck: Channel
    """The channel that is busy longest; the first of them in the order of `Channel` among equals."""
    overlap: str
    """Value of the OverlapMode that this is for."""


def predict_step(
    work: StepWork, profile: HardwareProfile, *, dtype: str, mode: OverlapMode, has_device: bool
) -> StepPrediction:
    """Predict how long a step takes.

    Args:
        work: what is to be done, from `count_step`.
        profile: rates of the machine.
        dtype: what matrix products are computed in, as `matrix_rates` names it.
        mode: when updates run.
        has_device: whether compute memory is a tier of its own.

    Returns:
        Time in all and by channel.

    Raises:
        ConfigError: the profile lacks a rate that is needed.

    Source: docs/cost_model.md.
    """
    compute_memory = Channel.DEVICE_MEMORY if has_device else Channel.HOST_MEMORY

    def span(*parts: Work) -> float:
        """Return the time of work done at once: what computes also makes the passes over its own memory."""
        seconds = profile.seconds(sum(parts, Work()), dtype)
        seconds[Channel.COMPUTE] += seconds.pop(compute_memory)
        return max(profile.span(seconds[Channel.COMPUTE], seconds[Channel.NVME]), *seconds.values())

    if mode is OverlapMode.OFF:
        step_s = span(work.forward) + span(work.backward) + span(work.update)
    elif mode is OverlapMode.NEXT_FORWARD:
        step_s = span(work.forward, work.update) + span(work.backward)
    else:
        step_s = max(span(work.forward, work.rest) + span(work.backward), span(work.total))
    seconds = profile.seconds(work.total, dtype)
    bottleneck = max(Channel, key=lambda channel: seconds[channel])
    return StepPrediction(step_s=step_s, seconds=seconds, bottleneck=bottleneck, overlap=mode.value)


def transformer_flops(
    *,
    num_params: int,
    num_tokens: int,
    num_layers: int,
    hidden_size: int,
    sequence_length: int,
    num_recomputed_params: int = 0,
) -> StepFlops:
    """Count the operations of a transformer's matrix products in one optimizer step.

    Args:
        num_params: elements of the matrices that tokens are multiplied with, the output layer included (once, if it is
            tied) and tables that are only looked up in left out.
        num_tokens: in all batches of the step.
        num_layers: with attention.
        hidden_size: all heads of a layer together.
        sequence_length: tokens that a token attends to; none is taken to be masked away.
        num_recomputed_params: those of `num_params` that activation checkpointing multiplies with again in backward;
            attention then is too. torch's stops a block as soon as backward has all it needs, before the last matrix.

    Returns:
        The operations.

    Raises:
        ConfigError: a number is negative.

    Source: Kaplan et al. 2020, section 2.1 (2 per parameter and token forward, twice that backward); Korthikanti et al.
    2022, appendix A (attention: scores and their product with the values, 2 x hidden_size each per pair of tokens).
    """
    counts = {
        "num_params": num_params,
        "num_tokens": num_tokens,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "sequence_length": sequence_length,
        "num_recomputed_params": num_recomputed_params,
    }
    for name, count in counts.items():
        if count < 0:
            raise ConfigError(f"transformer_flops: {name}: expected 0 or more, got {count}")
    attention = 4 * num_tokens * num_layers * hidden_size * sequence_length
    forward = 2 * num_params * num_tokens + attention
    again = 2 * num_recomputed_params * num_tokens + (attention if num_recomputed_params else 0)
    return StepFlops(forward=forward, backward=2 * forward + again)


def count_step(chunks: Sequence[ChunkDemand], plan: PlacementPlan, shape: RuntimeShape, flops: StepFlops) -> StepWork:
    """Count what a step has to do under a plan.

    A chunk without a residence is fetched once for forward and once for backward; gradients that live on disk are
    written there once and read back for the update, although a few will still be in memory.

    Args:
        chunks: the chunks, by id.
        plan: their homes.
        shape: sizes of the buffers.
        flops: the model's operations, which no plan changes.

    Returns:
        The work, padding of state records included.
    """
    fetched, stored, ahead, rest = (Work() for _ in range(4))
    for demand, homes in zip(chunks, plan.chunks, strict=True):
        if not homes.is_resident:
            fetched += _fetch(demand, homes, shape)
        if homes.grad is not None:
            stored += _store_gradient(demand, homes.grad, shape)
        goes_ahead = set(homes.spares)
        for tile, num_alike in _distinct_tiles(demand, homes, shape).items():
            update = _update_tile(demand, homes, tile, shape) * num_alike
            if tile in goes_ahead:
                ahead += update
            else:
                rest += update
    return StepWork(
        forward=fetched + _compute(flops.forward, flops.forward_nbytes, shape),
        backward=fetched + stored + _compute(flops.backward, flops.backward_nbytes, shape),
        ahead=ahead,
        rest=rest,
    )


def _distinct_tiles(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> dict[int, int]:
    """Return one trained tile for each length, pair of homes and kind of place, and how many are like it."""
    last = len(homes.state) - 1
    is_shorter = demand.numel % shape.tile_numel > 0
    spares = set(homes.spares)
    alike: dict[tuple[object, ...], list[int]] = {}
    for tile, pair in enumerate(zip(homes.state, homes.working, strict=False)):
        alike.setdefault((is_shorter and tile == last, tile in spares, *pair), []).append(tile)
    return {tiles[0]: len(tiles) for tiles in alike.values()}


def _compute(flops: float, nbytes: int, shape: RuntimeShape) -> Work:
    """Count the model's own operations, on the device or without one on the processor."""
    if shape.has_device:
        return Work(flops=flops, device_memory_nbytes=nbytes)
    return Work(flops=flops, host_memory_nbytes=nbytes)


def _fetch(demand: ChunkDemand, homes: ChunkPlacement, shape: RuntimeShape) -> Work:
    nvme_nbytes = sum(
        demand.working_tile_nbytes(tile, shape.tile_numel)
        for tile, tier in enumerate(homes.working)
        if tier is MemoryTier.NVME
    )
    if shape.has_device:  # whose copy engine reads host memory
        return Work(
            nvme_read_nbytes=nvme_nbytes, h2d_nbytes=demand.working_nbytes, host_memory_nbytes=demand.working_nbytes
        )
    return Work(nvme_read_nbytes=nvme_nbytes, host_memory_nbytes=2 * (demand.working_nbytes - nvme_nbytes))


def _store_gradient(demand: ChunkDemand, home: MemoryTier, shape: RuntimeShape) -> Work:
    """Count the pass that stores a gradient and computes its norm, and the ways before and after it."""
    stored_nbytes = demand.numel * demand.grad_itemsize(shape)
    passed_nbytes = demand.working_nbytes + stored_nbytes
    if home is MemoryTier.DEVICE:
        return Work(device_memory_nbytes=passed_nbytes)
    d2h_nbytes = demand.working_nbytes if shape.has_device else 0
    return Work(
        d2h_nbytes=d2h_nbytes,
        host_memory_nbytes=passed_nbytes + d2h_nbytes,
        nvme_written_nbytes=stored_nbytes if home is MemoryTier.NVME else 0,
    )


def _update_tile(demand: ChunkDemand, homes: ChunkPlacement, tile: int, shape: RuntimeShape) -> Work:
    working_nbytes = demand.working_tile_nbytes(tile, shape.tile_numel)
    state_nbytes = demand.state_tile_nbytes(tile, shape.tile_numel)
    grad_nbytes = demand.tile_length(tile, shape.tile_numel) * demand.grad_itemsize(shape)
    passed_nbytes = 2 * state_nbytes + 2 * working_nbytes + grad_nbytes
    if homes.state[tile] is MemoryTier.DEVICE:
        return Work(device_memory_nbytes=passed_nbytes)
    on_disk = MemoryTier.NVME
    moved_nbytes = working_nbytes * (homes.working[tile] is on_disk) + state_nbytes * (homes.state[tile] is on_disk)
    h2d_nbytes = working_nbytes if shape.has_device and homes.is_resident else 0
    if tile in homes.spares:  # what host memory has is written elsewhere, where a processor reads a line before it
        passed_nbytes += working_nbytes + state_nbytes - moved_nbytes
    return Work(
        h2d_nbytes=h2d_nbytes,
        host_memory_nbytes=passed_nbytes + h2d_nbytes,
        nvme_read_nbytes=moved_nbytes + grad_nbytes * (homes.grad is on_disk),
        nvme_written_nbytes=moved_nbytes,
    )
