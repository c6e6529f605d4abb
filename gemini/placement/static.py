"""Static placement: fixed byte fractions per tier, for experiments and for what the user knows better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gemini.errors import ConfigError
from gemini.placement.check import Budgets, check_plan
from gemini.placement.draft import Draft, Problem
from gemini.placement.plan import ChunkDemand, ChunkPlacement, PlacementPlan, RuntimeShape, is_used_in_place
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["StaticPlacement", "static_placement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPlacement:
    """Fixed fractions, counted in bytes: what is neither on the device nor on disk lives in host memory.

    Fractions are met to within one tile of a chunk's record, except that what lives on the device does so by whole
    chunks, because a parameter must be contiguous there.
    """

    param_device: float = 0.0
    """Fraction of the working-weight bytes that are always on the device. Must be 0 on the CPU."""
    param_nvme: float = 0.0
    """Fraction of the working-weight bytes that live on disk."""
    state_device: float = 0.0
    """Fraction of the optimizer-state bytes that live on the device, gradients with them; at most `param_device`."""
    state_nvme: float = 0.0
    """Fraction of the optimizer-state bytes that live on disk."""
    grad_nvme: float = 0.0
    """Fraction of the gradient bytes that wait on disk, by whole chunks."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            fraction = getattr(self, name)
            if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
                raise ConfigError(f"StaticPlacement.{name}: expected a fraction from 0 to 1, got {fraction!r}")
        for kind in ("param", "state"):
            on_device, on_disk = getattr(self, f"{kind}_device"), getattr(self, f"{kind}_nvme")
            if on_device + on_disk > 1:
                raise ConfigError(
                    f"StaticPlacement: {kind}_device + {kind}_nvme must not exceed 1, got {on_device} + {on_disk}"
                )
        if self.state_device + self.grad_nvme > 1:
            raise ConfigError(
                f"StaticPlacement: state_device + grad_nvme must not exceed 1, got {self.state_device} + "
                f"{self.grad_nvme}: gradients live where the state does"
            )
        if self.state_device > self.param_device:
            raise ConfigError(
                f"StaticPlacement: state_device must not exceed param_device, got {self.state_device} and "
                f"{self.param_device}: the device updates in place"
            )


def static_placement(
    chunks: Sequence[ChunkDemand],
    shape: RuntimeShape,
    static: StaticPlacement,
    budgets: Budgets,
    *,
    prefetch_depth: int,
    chunks_at_once: int = 2,
) -> PlacementPlan:
    """Choose homes by byte fractions.

    The device takes whole chunks from the last of the layout, those that must always be there first; the disk takes
    tiles from the first chunk on, the last tiles of a chunk first. Neither takes more than its fraction, and what is
    missing is less than the next tile, or the next chunk on the device and for gradients. A chunk that is on the device
    without its state has its home in host memory and a copy on the device. The chunks that must always be in compute
    memory are there in any case. With several ranks the fractions are of this rank's shards, which live on the device
    with their state or not at all, and no other chunk has a copy there. A frozen chunk that ranks of a machine share is
    shared if the fractions leave all of it in host memory.

    Args:
        chunks: the chunks, by id.
        shape: sizes of the buffers.
        static: the fractions.
        budgets: bytes per tier.
        prefetch_depth: chunks to be fetched ahead; two slots more than that are taken where they fit.
        chunks_at_once: the most chunks without a residence that must be in compute memory at the same time.

    Returns:
        The plan.

    Raises:
        ConfigError: a fraction is of a tier that does not exist.
        OutOfTierMemoryError: a budget is too small for its fraction.
    """
    if not shape.has_device and static.param_device > 0:
        raise ConfigError(
            f"StaticPlacement.param_device: expected 0 because there is no device tier, got {static.param_device}"
        )
    for name in ("param_nvme", "state_nvme", "grad_nvme"):
        if getattr(static, name) > 0 and budgets.nvme is None:
            raise ConfigError(
                f"StaticPlacement.{name}: expected 0 because there is no disk tier, got {getattr(static, name)}; "
                "add nvme=NVMeConfig(...)"
            )
    homes = _choose_homes(chunks, shape, static)
    fewest = max(chunks_at_once, 2)
    most = max(prefetch_depth + 2, fewest)
    problem = Problem(chunks=chunks, shape=shape, budgets=budgets, fewest_slots=fewest, most_slots=most)
    for slot_cap in range(most, fewest - 1, -1):
        draft = Draft(problem, homes, slot_cap)
        if draft.fits(problem.compute_tier):
            break
    plan = draft.plan()
    check_plan(chunks, plan, shape, budgets, chunks_at_once=chunks_at_once)
    return plan


def _choose_homes(chunks: Sequence[ChunkDemand], shape: RuntimeShape, static: StaticPlacement) -> list[ChunkPlacement]:
    """Return each chunk's homes, regardless of budgets."""
    ids = sorted(range(len(chunks)), key=lambda i: (not chunks[i].is_pinned, -i))  # first to the device, last to disk
    trainable = [i for i in ids if chunks[i].is_trainable]
    working = {i: _TileSizes.of(chunks[i], shape, chunks[i].working_tile_nbytes) for i in ids}
    state = {i: _TileSizes.of(chunks[i], shape, chunks[i].state_tile_nbytes) for i in trainable}
    grads = {i: _TileSizes(num_full=0, full_nbytes=0, last_nbytes=_grad_nbytes(chunks[i], shape)) for i in trainable}

    param_target = static.param_device * _total(working, ids)
    with_state = _take_chunks(state, trainable, static.state_device * _total(state, trainable))
    while _total(working, with_state) > param_target:  # states of unequal dtypes
        with_state.pop()
    others = [i for i in ids if i not in set(with_state)]
    residents = {*with_state, *_take_chunks(working, others, param_target - _total(working, with_state))}
    on_device = {i for i in residents if i in set(with_state) or not chunks[i].is_trainable}

    def take_for_disk(sizes: dict[int, _TileSizes], fraction: float, kept: set[int]) -> dict[int, int]:
        candidates = [i for i in reversed(ids) if i in sizes and i not in kept]
        return _take_tiles(sizes, candidates, fraction * _total(sizes, sizes))

    on_disk = _OnDisk(
        working=take_for_disk(working, static.param_nvme, residents),
        state=take_for_disk(state, static.state_nvme, on_device),
        grads=take_for_disk(grads, static.grad_nvme, on_device),
    )
    return [
        _home_on_device(demand, shape)
        if i in on_device
        else _home_below(demand, shape, on_disk, is_resident=i in residents)
        for i, demand in enumerate(chunks)
    ]


@dataclass(frozen=True, slots=True)
class _TileSizes:
    """Bytes of a chunk's tiles of one kind: all alike but the last."""

    num_full: int
    full_nbytes: int
    last_nbytes: int

    @staticmethod
    def of(demand: ChunkDemand, shape: RuntimeShape, tile_nbytes: Callable[[int, int], int]) -> _TileSizes:
        last = demand.num_tiles(shape.tile_numel) - 1
        return _TileSizes(last, tile_nbytes(0, shape.tile_numel), tile_nbytes(last, shape.tile_numel))

    @property
    def nbytes(self) -> int:
        return self.num_full * self.full_nbytes + self.last_nbytes

    def num_last_tiles_within(self, nbytes: float) -> int:
        """Return how many tiles, counted from the last, take at most `nbytes`."""
        if self.last_nbytes > nbytes:
            return 0
        if not self.num_full:
            return 1
        return 1 + min(self.num_full, int((nbytes - self.last_nbytes) // self.full_nbytes))


@dataclass(frozen=True, slots=True)
class _OnDisk:
    """How many of a chunk's last tiles are on disk, by chunk id; a gradient counts as one tile."""

    working: dict[int, int]
    state: dict[int, int]
    grads: dict[int, int]


def _total(sizes: dict[int, _TileSizes], ids: Iterable[int]) -> int:
    return sum(sizes[i].nbytes for i in ids)


def _take_chunks(sizes: dict[int, _TileSizes], ids: Iterable[int], target_nbytes: float) -> list[int]:
    """Return the longest prefix of `ids` that takes at most the target."""
    taken: list[int] = []
    for i in ids:
        target_nbytes -= sizes[i].nbytes
        if target_nbytes < 0:
            break
        taken.append(i)
    return taken


def _take_tiles(sizes: dict[int, _TileSizes], ids: Iterable[int], target_nbytes: float) -> dict[int, int]:
    """Return how many of each chunk's last tiles to take, chunk after chunk, for at most the target in all."""
    taken: dict[int, int] = {}
    for i in ids:
        if sizes[i].nbytes > target_nbytes:
            taken[i] = sizes[i].num_last_tiles_within(target_nbytes)
            break
        taken[i] = sizes[i].num_full + 1
        target_nbytes -= sizes[i].nbytes
    return taken


def _grad_nbytes(demand: ChunkDemand, shape: RuntimeShape) -> int:
    return round_up(demand.numel * demand.grad_itemsize(shape), IO_ALIGNMENT_NBYTES)


def _home_on_device(demand: ChunkDemand, shape: RuntimeShape) -> ChunkPlacement:
    tiles = (MemoryTier.DEVICE,) * demand.num_tiles(shape.tile_numel)
    return ChunkPlacement(
        chunk_id=demand.chunk_id,
        working=tiles,
        state=tiles if demand.is_trainable else (),
        grad=MemoryTier.DEVICE if demand.is_trainable else None,
        is_resident=demand.is_pinned or not demand.is_sharded,
    )


def _home_below(demand: ChunkDemand, shape: RuntimeShape, on_disk: _OnDisk, *, is_resident: bool) -> ChunkPlacement:
    num_tiles = demand.num_tiles(shape.tile_numel)

    def tiles(num_on_disk: int) -> tuple[MemoryTier, ...]:
        return (MemoryTier.HOST,) * (num_tiles - num_on_disk) + (MemoryTier.NVME,) * num_on_disk

    working = tiles(on_disk.working.get(demand.chunk_id, 0))
    has_copy = demand.is_pinned or (is_resident and not demand.is_sharded)
    grad = MemoryTier.NVME if on_disk.grads.get(demand.chunk_id) else MemoryTier.HOST
    return ChunkPlacement(
        chunk_id=demand.chunk_id,
        working=working,
        state=tiles(on_disk.state.get(demand.chunk_id, 0)) if demand.is_trainable else (),
        grad=grad if demand.is_trainable else None,
        is_resident=has_copy or is_used_in_place(demand, working, shape),
    )
