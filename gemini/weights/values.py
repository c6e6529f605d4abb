"""Reads and writes single parameters and their state in their homes, in any tier.

With several ranks a home holds a shard; with tensor parallelism, a shard of this rank's part. A value is read from all
ranks' pieces, so all ranks must read the same parameters in the same order, and each gets the whole value. To write a
value, each rank writes its piece; what ranks share is written by one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from gemini.chunk.chunk import Chunk
from gemini.chunk.cut import piece_of
from gemini.chunk.layout import ParamPlace
from gemini.offload.home import TiledHome
from gemini.ranks.sharding import RankAxis
from gemini.runtime.runtime import Runtime
from gemini.tiers import TileGrid
from gemini.update.state_record import follow_changes, join_masters, record_views, split_masters

__all__ = [
    "FROZEN_KINDS",
    "STATE_KINDS",
    "kinds_of",
    "load_masters",
    "drop_commit",
    "load_moments",
    "master_runs",
    "owned_run",
    "read_gradient",
    "read_master",
    "read_moments",
    "read_own_working",
    "read_parts",
    "read_working",
    "reset_moments",
    "same_bits",
    "store_master",
    "store_written",
    "working_runs",
    "write_parts",
]

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")
"""Kinds of a trainable parameter's values: master, momentum and variance, under torch.optim.AdamW's names."""
FROZEN_KINDS = ("weight",)
"""Kinds of a frozen parameter's values."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter's part of one tile."""

    tile: int
    length: int
    """Number of elements in the tile."""
    in_tile: slice
    in_param: slice


def working_runs(runtime: Runtime, place: ParamPlace) -> Iterator[torch.Tensor]:
    """Yield the part of a parameter's working weights in this rank's homes, in order, up to a tile at a time.

    Args:
        runtime: the engine's runtime.
        place: the parameter.

    Yields:
        Values, 1D, on the CPU; to be used before the next ones are requested.
    """
    chunk, piece = _chunk_and_piece(runtime, place)
    for part in _parts(runtime, piece):
        with _opened(runtime, chunk.home, part.tile) as tile:
            yield _typed(tile, part.length, place.spec.dtype)[part.in_tile]


def master_runs(runtime: Runtime, place: ParamPlace) -> Iterator[torch.Tensor]:
    """Yield a parameter's float32 master in the way of `working_runs`; frozen parameters unchanged."""
    state = runtime.states.get(place.chunk_id)
    if state is None:
        yield from working_runs(runtime, place)
        return
    chunk, piece = _chunk_and_piece(runtime, place)
    for part in _parts(runtime, piece):
        with (
            _opened(runtime, chunk.home, part.tile) as tile,
            _opened(runtime, state, part.tile) as record,
        ):
            working = _typed(tile, part.length, place.spec.dtype)[part.in_tile]
            master = torch.empty(working.numel(), dtype=torch.float32)
            join_masters(master, working, _rest(record, part, place.spec.dtype))
            yield master


def read_working(runtime: Runtime, place: ParamPlace) -> torch.Tensor:
    """Return a parameter's working weights, a CPU copy in its shape."""
    return _collect(runtime, place, working_runs(runtime, place), place.spec.dtype)


def read_own_working(runtime: Runtime, place: ParamPlace) -> torch.Tensor:
    """Return the working weights of this rank's part of a parameter, a CPU copy in its shape."""
    return read_working(runtime, _without_split(place))


def _without_split(place: ParamPlace) -> ParamPlace:
    return dataclasses.replace(place, spec=dataclasses.replace(place.spec, split=None))


def read_gradient(runtime: Runtime, place: ParamPlace) -> torch.Tensor:
    """Return the gradient that waits of this rank's part of a parameter, a float32 CPU copy, loss scale included."""
    runtime.gradients.finish()
    place = _without_split(place)
    home, dtype = runtime.gradients.home_of(place.chunk_id), runtime.gradients.dtype_of(place.chunk_id)

    def runs() -> Iterator[torch.Tensor]:
        for part in _parts(runtime, _chunk_and_piece(runtime, place)[1]):
            with _opened(runtime, home, part.tile) as tile:
                yield _typed(tile, part.length, dtype)[part.in_tile].to(torch.float32)

    return _collect(runtime, place, runs(), torch.float32)


def read_master(runtime: Runtime, place: ParamPlace) -> torch.Tensor:
    """Return a parameter's float32 master, a CPU copy in its shape; frozen parameters unchanged."""
    dtype = torch.float32 if place.chunk_id in runtime.states else place.spec.dtype
    return _collect(runtime, place, master_runs(runtime, place), dtype)


def _collect(runtime: Runtime, place: ParamPlace, runs: Iterable[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return a parameter's values in its shape, given this rank's part."""
    flat = torch.empty(_chunk_and_piece(runtime, place)[1].spec.numel, dtype=dtype)
    done = 0
    for run in runs:
        flat[done : done + run.numel()] = run
        done += run.numel()
    return _make_whole(runtime, place, flat)


def load_masters(runtime: Runtime, values: Iterable[tuple[ParamPlace, torch.Tensor]]) -> None:
    """Set masters and working weights of parameters to values of any float dtype.

    Copies in compute memory are updated. For weights that ranks share, one rank's value counts.

    Args:
        runtime: the engine's runtime.
        values: parameters and their values, of the same shape, on any device.

    Raises:
        CollectiveError: see `loading`.
    """
    with loading(runtime):
        for place, value in values:
            _load_master(runtime, place, value)


@contextmanager
def loading(runtime: Runtime) -> Iterator[None]:
    """Allow writes to homes inside the context, including homes that ranks share.

    With shared homes all ranks must call this: they meet before, so that none still uses what changes, and after.

    Args:
        runtime: the engine's runtime.

    Yields:
        Nothing.

    Raises:
        CollectiveError: a rank did not come; some weights are still the old ones.
    """
    drop_commit(runtime)
    shared = [chunk.home for chunk in runtime.core.chunks if chunk.home.is_shared]
    if shared:
        runtime.resources.transfers.synchronize()
        _await_ranks(runtime, name="readiness to load shared weights")
    yield
    if shared:
        _await_ranks(runtime, name="end of loading shared weights")
        for home in shared:
            home.refresh()


def drop_commit(runtime: Runtime) -> None:
    """Drop the committed step before weights or state change in another way; with several ranks all call.

    Args:
        runtime: the engine's runtime.

    Raises:
        CollectiveError: a rank did not come; nothing has changed.
    """
    if runtime.commits.has_record:
        runtime.commits.drop()
        _await_ranks(runtime, name="ends of what was committed")


def _await_ranks(runtime: Runtime, *, name: str) -> None:
    runtime.sharding.group.gather_values(torch.zeros(1), name=name)


def _load_master(runtime: Runtime, place: ParamPlace, value: torch.Tensor) -> None:
    chunk = runtime.core.begin_update(place.chunk_id)
    state = runtime.states.get(place.chunk_id)
    piece = _chunk_and_piece(runtime, place)[1]
    flat = _cut(chunk, place, value)
    try:
        for part in _parts(runtime, piece) if chunk.home.is_writable else ():
            with _opened(runtime, chunk.home, part.tile, write=True) as tile:
                working = _typed(tile, part.length, place.spec.dtype)[part.in_tile]
                if state is None:
                    working.copy_(flat[part.in_param])
                else:
                    source = flat[part.in_param].to(torch.float32).contiguous()
                    with _opened(runtime, state, part.tile, write=True) as record:
                        split_masters(working, _rest(record, part, place.spec.dtype), source)
        _refresh(runtime, chunk, place)
    finally:
        runtime.core.end_update(place.chunk_id)


def _refresh(runtime: Runtime, chunk: Chunk, place: ParamPlace) -> None:
    """Update a parameter's copy in compute memory, if there is one that is not gathered anew anyway."""
    if chunk.slot is not None and not chunk.is_common:
        copy = chunk.slot.buffer[: chunk.spec.working_nbytes].view(chunk.spec.dtype)
        copy[place.begin : place.end].copy_(read_working(runtime, place).reshape(-1))


def store_written(runtime: Runtime, place: ParamPlace, values: torch.Tensor, old: torch.Tensor | None) -> None:
    """Write home working weights that were written in compute memory; masters follow where bits have changed.

    Args:
        runtime: the engine's runtime.
        place: the parameter.
        values: this rank's part of the parameter, in its shape and dtype, on any device.
        old: the previous values; None: the home's values.
    """
    chunk, piece = _chunk_and_piece(runtime, place)
    state = runtime.states.get(place.chunk_id)
    new_flat = _own_piece(chunk, place, values)
    old_flat = None if old is None else _own_piece(chunk, place, old)
    for part in _parts(runtime, piece) if chunk.home.is_writable else ():
        new = new_flat[part.in_param]
        if old_flat is not None and same_bits(new, old_flat[part.in_param]):
            continue
        with _opened(runtime, chunk.home, part.tile, write=True) as tile:
            working = _typed(tile, part.length, place.spec.dtype)[part.in_tile]
            before = working.clone() if old_flat is None else old_flat[part.in_param]
            working.copy_(new)
        if state is not None and place.spec.dtype is not torch.float32:
            with _opened(runtime, state, part.tile, write=True) as record:
                rest = _rest(record, part, place.spec.dtype)
                assert rest is not None
                follow_changes(rest, new, before)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two contiguous tensors of one shape and dtype hold the same bits."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _own_piece(chunk: Chunk, place: ParamPlace, values: torch.Tensor) -> torch.Tensor:
    """Return the elements of a parameter in this rank's shard, flat on the CPU."""
    flat = values.detach().to("cpu").reshape(-1)
    return flat if chunk.shard is None else flat[piece_of(place, chunk.shard)]


def store_master(runtime: Runtime, place: ParamPlace, values: torch.Tensor) -> None:
    """Set the masters of a half-precision parameter to values of a wider float dtype, which broadcast to its shape."""
    chunk, piece = _chunk_and_piece(runtime, place)
    state = runtime.states[place.chunk_id]
    flat = _cut(chunk, place, values.detach().to("cpu", torch.float32).expand(place.spec.full_shape))
    for part in _parts(runtime, piece):
        with (
            _opened(runtime, chunk.home, part.tile, write=True) as tile,
            _opened(runtime, state, part.tile, write=True) as record,
        ):
            working = _typed(tile, part.length, place.spec.dtype)[part.in_tile]
            split_masters(working, _rest(record, part, place.spec.dtype), flat[part.in_param].contiguous())


def read_moments(runtime: Runtime, place: ParamPlace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a trainable parameter's momentum and variance, float32 CPU copies in its shape."""
    piece = _chunk_and_piece(runtime, place)[1]
    momentum = torch.empty(piece.spec.numel, dtype=torch.float32)
    variance = torch.empty(piece.spec.numel, dtype=torch.float32)
    for part in _parts(runtime, piece):
        with _opened(runtime, runtime.states[place.chunk_id], part.tile) as record:
            _, first, second = record_views(record, part.length, place.spec.dtype)
            momentum[part.in_param] = first[part.in_tile]
            variance[part.in_param] = second[part.in_tile]
    return _make_whole(runtime, place, momentum), _make_whole(runtime, place, variance)


def load_moments(runtime: Runtime, place: ParamPlace, momentum: torch.Tensor, variance: torch.Tensor) -> None:
    """Set a trainable parameter's moments, after `drop_commit`; values have its shape, any float dtype and device."""
    chunk, piece = _chunk_and_piece(runtime, place)
    flat_momentum, flat_variance = _cut(chunk, place, momentum), _cut(chunk, place, variance)
    for part in _parts(runtime, piece):
        with _opened(runtime, runtime.states[place.chunk_id], part.tile, write=True) as record:
            _, first, second = record_views(record, part.length, place.spec.dtype)
            first[part.in_tile] = flat_momentum[part.in_param]
            second[part.in_tile] = flat_variance[part.in_param]


def owned_run(runtime: Runtime, place: ParamPlace) -> slice:
    """Return the elements of this rank's part of a parameter that are here, in row-major order: all, unless sharded."""
    shard = runtime.core.chunks[place.chunk_id].shard
    return slice(0, place.spec.numel) if shard is None else piece_of(place, shard)


def kinds_of(runtime: Runtime, place: ParamPlace) -> tuple[str, ...]:
    """Return the kinds that `read_parts` yields for a parameter: `STATE_KINDS` if trainable, else `FROZEN_KINDS`."""
    return STATE_KINDS if place.chunk_id in runtime.states else FROZEN_KINDS


def read_parts(runtime: Runtime, place: ParamPlace) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the parts of a parameter in this rank's homes, in order, a tile at a time: 1D CPU copies, by kind.

    Trainable parameters come as float32, frozen ones in their working dtype.
    """
    chunk, piece = _chunk_and_piece(runtime, place)
    state = runtime.states.get(place.chunk_id)
    for part in _parts(runtime, piece):
        with _opened(runtime, chunk.home, part.tile) as tile:
            working = _typed(tile, part.length, place.spec.dtype)[part.in_tile]
            if state is None:
                yield {"weight": working.clone()}
                continue
            with _opened(runtime, state, part.tile) as record:
                _, momentum, variance = record_views(record, part.length, place.spec.dtype)
                master = torch.empty(working.numel(), dtype=torch.float32)
                join_masters(master, working, _rest(record, part, place.spec.dtype))
                moments = (momentum[part.in_tile].clone(), variance[part.in_tile].clone())
        yield dict(zip(STATE_KINDS, (master, *moments), strict=True))


def write_parts(runtime: Runtime, place: ParamPlace, read: Callable[[str, int, int], torch.Tensor]) -> None:
    """Set the parts of a parameter in this rank's homes, a tile at a time, inside `loading`; compute copies follow.

    Args:
        runtime: the engine's runtime.
        place: the parameter.
        read: returns elements [begin, end) of this rank's part of the parameter, in row-major order, for a kind from
            `kinds_of`.
    """
    chunk, piece = runtime.core.begin_update(place.chunk_id), _chunk_and_piece(runtime, place)[1]
    state = runtime.states.get(place.chunk_id)
    first = owned_run(runtime, place).start
    try:
        for part in _parts(runtime, piece) if chunk.home.is_writable else ():
            run = (first + part.in_param.start, first + part.in_param.stop)
            values = [read(kind, *run) for kind in kinds_of(runtime, place)]
            with _opened(runtime, chunk.home, part.tile, write=True) as tile:
                working = _typed(tile, part.length, place.spec.dtype)[part.in_tile]
                if state is None:
                    working.copy_(values[0])
                    continue
                with _opened(runtime, state, part.tile, write=True) as record:
                    split_masters(working, _rest(record, part, place.spec.dtype), values[0])
                    _, momentum, variance = record_views(record, part.length, place.spec.dtype)
                    momentum[part.in_tile] = values[1]
                    variance[part.in_tile] = values[2]
        _refresh(runtime, chunk, place)
    finally:
        runtime.core.end_update(place.chunk_id)


def reset_moments(runtime: Runtime) -> None:
    """Set momentum and variance of every parameter to zero; with several ranks all must call."""
    drop_commit(runtime)
    for chunk_id, state in runtime.states.items():
        spec = runtime.core.chunks[chunk_id].home_spec
        grid = TileGrid(spec.numel, runtime.config.tile_numel)
        for tile in range(len(state.tiers)):
            length = grid.length_of(tile)
            with _opened(runtime, state, tile, write=True) as record:
                _, momentum, variance = record_views(record, length, spec.dtype)
                momentum.zero_()
                variance.zero_()


def _chunk_and_piece(runtime: Runtime, place: ParamPlace) -> tuple[Chunk, ParamPlace]:
    """Return a parameter's chunk, and the piece of the parameter in this rank's shard, with its place at home."""
    chunk = runtime.core.chunks[place.chunk_id]
    if chunk.shard is None:
        return chunk, place
    piece = piece_of(place, chunk.shard)
    spec = dataclasses.replace(place.spec, shape=(piece.stop - piece.start,), split=None)
    return chunk, dataclasses.replace(place, spec=spec, begin=place.begin + piece.start - chunk.shard.begin)


def _cut(chunk: Chunk, place: ParamPlace, value: torch.Tensor) -> torch.Tensor:
    """Return the piece of a parameter's value in this rank's shard, flat on the CPU."""
    whole = value.detach().to("cpu")
    flat = (whole if place.spec.split is None else place.spec.split.cut(whole)).reshape(-1)
    return flat if chunk.shard is None else flat[piece_of(place, chunk.shard)]


def _make_whole(runtime: Runtime, place: ParamPlace, flat: torch.Tensor) -> torch.Tensor:
    """Return a whole parameter, or values of its size, from all ranks' pieces; with several ranks all must call."""
    shard = runtime.core.chunks[place.chunk_id].shard
    if shard is None:
        return flat.view(place.spec.shape)
    if not place.spec.numel:
        return flat.view(place.spec.full_shape)
    split = place.spec.split
    pieces = [piece_of(place, shard.of_rank(rank)) for rank in range(shard.num_ranks)]
    padded = flat.new_zeros(max(piece.stop - piece.start for piece in pieces))
    padded[: flat.numel()] = flat
    axes = (RankAxis.SHARD,) if split is None else (RankAxis.SHARD, RankAxis.TENSOR)
    gathered = runtime.sharding.group.gather_along(axes, padded, name=place.spec.name)
    parts = []
    for rows in gathered.view(-1, shard.num_ranks, padded.numel()):
        whole = [values[: piece.stop - piece.start] for values, piece in zip(rows, pieces, strict=True)]
        parts.append(torch.cat(whole).view(place.spec.shape))
    return parts[0] if split is None else split.join(parts)


def _parts(runtime: Runtime, place: ParamPlace) -> Iterator[_Part]:
    tile_numel = runtime.config.tile_numel
    if place.spec.numel == 0:
        return
    grid = TileGrid(runtime.core.chunks[place.chunk_id].home_spec.numel, tile_numel)
    for tile in range(place.begin // tile_numel, -(-place.end // tile_numel)):
        begin, end = grid.range_of(tile)
        low, high = max(place.begin, begin), min(place.end, end)
        yield _Part(tile, end - begin, slice(low - begin, high - begin), slice(low - place.begin, high - place.begin))


def _rest(record: torch.Tensor, part: _Part, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a parameter's masters in a tile's record; None where working weights are the masters."""
    rest = record_views(record, part.length, dtype)[0]
    return None if rest is None else rest[part.in_tile]


def _typed(tile: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    return tile[: length * dtype.itemsize].view(dtype)


def _opened(
    runtime: Runtime, home: TiledHome, tile: int, *, write: bool = False
) -> AbstractContextManager[torch.Tensor]:
    """Open a tile; see TiledHome.opened. With `write`, no committed step may be recorded."""
    assert not (write and runtime.commits.has_record)
    return home.opened(tile, runtime.resources.transfers, write=write)
