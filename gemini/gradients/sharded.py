"""Gradients of chunks whose shards belong to several ranks: assembled, exchanged, averaged, and kept by shard.

A chunk's gradients are assembled whole, in the working dtype, in an exchange slot of compute memory; exchange.py
exchanges them. The mean, rounded once to the working dtype, goes to a GradientStore whose chunks are shards. From there
on, everything is as with one rank.

[Note: Same exchanges on all ranks]
All ranks take part in an exchange or it hangs, and all collectives of a group must be asked for in one order, gathers
of weights among them. Which gradients arrive, and when, may differ among ranks. So it does not matter: a backward pass
exchanges every chunk exactly once, in the reverse of the order in which forward used them, each when backward reaches
a unit after its own, the rest when backward ends, with zeros for what a rank has not got. A unit that forward uses
several times is reached as often; how often, the last backward pass tells. What arrives for a chunk that has gone is
kept and exchanged in the step, once the ranks have agreed that any of them has such latecomers. The same agreement says
which parameters have a gradient on any rank, and carries the sums of squares: one synchronisation a step.

Chunks that are used all through a step (the root unit's), and all of them in stage 1, are kept whole until the step and
exchanged only then, however many backward passes there were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from gemini.autograd.backward_pass import BackwardPass
from gemini.chunk.cut import cut_spec
from gemini.chunk.layout import ChunkSpec
from gemini.errors import ConfigError, ModelError
from gemini.gradients.accumulators import GradientAccumulators
from gemini.gradients.arrivals import GradientListener, second_gradient_error
from gemini.gradients.exchange import ExchangeSlot, GradientExchange
from gemini.gradients.store import GradientStore
from gemini.offload.home import TiledHome
from gemini.offload.transfer import Transfers
from gemini.ranks.sharding import ChunkShard, PartSums, ShardGroup
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["ShardedGradients"]


@dataclass(eq=False)
class _Chunk:
    """The gradients of one chunk in the step under way, as far as they have not been exchanged."""

    spec: ChunkSpec
    shard: ChunkShard
    kept: torch.Tensor | None
    """uint8; whole gradients in the waiting dtype, of a chunk that is exchanged in the step; None for others."""
    slot: ExchangeSlot | None = None
    filled: set[int] = field(default_factory=set)
    """Positions of which `kept` or `slot` has a gradient."""
    waiting: dict[int, torch.Tensor] = field(default_factory=dict)
    """Flat gradients for which there has been no slot yet, or never will be, by position."""
    late: dict[int, torch.Tensor] = field(default_factory=dict)
    """Flat float32 sums of what came after this backward pass had exchanged the chunk, by position."""
    turn: int = 0
    """Its place in this backward pass's order of exchanges."""
    num_reached: int = 0
    """How often this backward pass has reached its unit."""
    num_expected: int = 1
    """How often it probably will."""
    has_gone: bool = False
    """Whether this backward pass has exchanged the chunk."""
    delivered: set[int] = field(default_factory=set)
    """Positions that have had a gradient here since the last update."""
    earlier: set[int] = field(default_factory=set)
    """Those of them that an earlier backward pass has delivered."""


class ShardedGradients:
    """All gradients of one engine whose chunks are sharded; to the engine what GradientStore is with one rank.

    Args:
        shards: keeps the gradients of this rank's shards; closed with this.
        group: the ranks.
        transfers: source of compute memory.
        sums: adds up what the ranks have; closed with this. It has as many slots, at least 2, as there are chunks whose
            gradients are put together, or exchanged, at the same time. Gradients of a chunk that is larger than a slot,
            in the working dtype, wait as autograd made them until it is the chunk's turn.
    """

    def __init__(self, shards: GradientStore, group: ShardGroup, transfers: Transfers, sums: PartSums) -> None:
        self.num_backwards = 0
        """Backward passes since gradients were last cleared, the one under way included."""
        self.expected_backwards = 1
        """Backward passes of the last step that was taken."""
        self.hyper_fingerprint = 0
        """Fingerprint of what the optimizer will do; all ranks must have the same."""
        self._shards = shards
        self._group = group
        self._transfers = transfers
        self._chunks: dict[int, _Chunk] = {}
        self._exchange = GradientExchange(group, sums, transfers.device, deliver=self._put_mean)
        self._put_shard = shards.put_on_host if sums.are_on_host else shards.put
        self._order: list[_Chunk] = []
        self._num_gone = 0
        self.backward_pass = BackwardPass()
        self._is_taking_means = False
        self._agreed_sums: dict[str, float] | None = None

    def add_chunk(
        self,
        spec: ChunkSpec,
        home: TiledHome,
        tier: MemoryTier,
        *,
        shard: ChunkShard | None = None,
        is_kept_whole: bool = False,
    ) -> None:
        """Take charge of a trainable chunk's gradients.

        Args:
            spec: layout of the whole chunk.
            home: where the shard's gradients wait.
            tier: the home's.
            shard: this rank's shard.
            is_kept_whole: whether they are exchanged only in the step.
        """
        assert shard is not None
        self._shards.add_chunk(cut_spec(spec, shard), home, tier)
        kept = None
        if is_kept_whole:
            nbytes = round_up(shard.whole_numel * self.dtype_of(spec.chunk_id).itemsize, IO_ALIGNMENT_NBYTES)
            kept = self._transfers.allocate(nbytes, "whole gradients")
        self._chunks[spec.chunk_id] = _Chunk(spec, shard, kept)

    # ---------------------------------------------------------------- during backward

    def begin_backward(self, distance: Callable[[int], int]) -> None:
        """Begin a backward pass, which autograd will end; do nothing inside another one.

        Args:
            distance: how soon forward uses a chunk, lower is sooner; the same on all ranks.
        """
        if self.backward_pass.has_failed:
            self.end_backward()
        if not self.backward_pass.join(self.end_backward):
            return
        self.num_backwards += 1
        self._end_means()
        exchanged = [chunk for chunk in self._chunks.values() if chunk.kept is None]
        self._order = sorted(exchanged, key=lambda chunk: (-distance(chunk.spec.chunk_id), -chunk.spec.chunk_id))
        self._num_gone = 0
        for turn, chunk in enumerate(self._order):
            chunk.turn, chunk.has_gone = turn, False
            chunk.num_expected, chunk.num_reached = max(chunk.num_reached, 1), 0
        for chunk in self._chunks.values():
            chunk.earlier |= chunk.delivered

    def reach_unit(self, chunk_ids: Sequence[int], distance: Callable[[int], int]) -> None:
        """Begin a backward pass unless one is under way, and exchange what the units reached before have delivered.

        Args:
            chunk_ids: the unit's own; the same on all ranks.
            distance: how soon forward uses a chunk, lower is sooner; the same on all ranks.
        """
        self.begin_backward(distance)
        for chunk in [self._chunks[chunk_id] for chunk_id in chunk_ids if chunk_id in self._chunks]:
            if chunk.kept is None:
                chunk.num_reached += 1
                while self._num_gone < chunk.turn and self._has_passed(self._order[self._num_gone]):
                    self._exchange_next()

    def put(self, chunk_id: int, position: int, grad: torch.Tensor) -> None:
        """Take one parameter's gradient as autograd hands it over.

        Args:
            chunk_id: the parameter's chunk.
            position: its position in the chunk's layout.
            grad: any float dtype and strides, the parameter's shape; read only.

        Raises:
            ModelError: a second backward pass before the update, and gradients are not kept as float32.
            CollectiveError: the group has failed.
        """
        self.begin_backward(lambda chunk_id: chunk_id)
        chunk = self._chunks[chunk_id]
        self._check_accumulation(chunk, position, has_gradient=position in chunk.earlier)
        flat = self._note(chunk, position, grad)
        if chunk.has_gone:
            self._keep_late(chunk, position, flat)
        elif chunk.kept is not None or self._has_slot(chunk):
            self._fill(chunk, position, flat)
        else:
            waiting = chunk.waiting.get(position)
            chunk.waiting[position] = flat if waiting is None else waiting + flat

    def add(self, gradients: Sequence[tuple[int, int, torch.Tensor]]) -> None:
        """Take gradients that no backward pass delivers; they are exchanged in the step, whichever ranks have some.

        Args:
            gradients: chunk, position in its layout and gradient, as for `put`.

        Raises:
            ModelError: as `put`.
        """
        self.num_backwards += 1
        for chunk_id, position, grad in gradients:
            chunk = self._chunks[chunk_id]
            self._check_accumulation(chunk, position, has_gradient=position in chunk.delivered)
            flat = self._note(chunk, position, grad)
            if chunk.kept is not None:
                self._fill(chunk, position, flat)
            else:
                self._keep_late(chunk, position, flat)

    def add_zeros(self, places: Sequence[tuple[int, int]], zeros: Callable[[int, int], torch.Tensor]) -> None:
        """Give gradients of zeros, which `zeros` makes, to parameters of which this rank has none."""
        for chunk_id, position in places:
            chunk = self._chunks[chunk_id]
            if chunk.has_gone:  # with zeros for what this rank had not got
                chunk.delivered.add(position)
                self._agreed_sums = None
            else:
                self.add([(chunk_id, position, zeros(chunk_id, position))])
                self.num_backwards -= 1

    def has(self, chunk_id: int, position: int) -> bool:
        """Return whether this rank has had a gradient of a parameter since gradients were last cleared."""
        return position in self._chunks[chunk_id].delivered

    def _note(self, chunk: _Chunk, position: int, grad: torch.Tensor) -> torch.Tensor:
        """Note that a gradient has come; return its values, 1D and dense."""
        self._agreed_sums = None
        chunk.delivered.add(position)
        return (grad.to_dense() if grad.is_sparse else grad).detach().reshape(-1)

    def _keep_late(self, chunk: _Chunk, position: int, flat: torch.Tensor) -> None:
        late = chunk.late.get(position)
        chunk.late[position] = flat.to(torch.float32, copy=True) if late is None else late.add_(flat)

    def _check_accumulation(self, chunk: _Chunk, position: int, *, has_gradient: bool) -> None:
        dtype = self.dtype_of(chunk.spec.chunk_id)
        if (has_gradient or chunk.has_gone) and dtype is not torch.float32:
            raise second_gradient_error(chunk.spec.places[position].spec.name, dtype)

    def _has_passed(self, chunk: _Chunk) -> bool:
        """Return whether backward has reached a chunk's unit as often as it probably will."""
        return chunk.num_reached >= chunk.num_expected

    def end_backward(self) -> None:
        """Exchange what has not been; called by autograd when a backward pass has ended."""
        self.backward_pass.end()
        while self._num_gone < len(self._order):
            self._exchange_next()
        if self._group.grid.num_replicas > 1:  # sums over replicas start here or in backward, never in `clear`
            self._end_means()

    def _fill(self, chunk: _Chunk, position: int, flat: torch.Tensor) -> None:
        whole = self._whole(chunk)
        place = chunk.spec.places[position]
        if position in chunk.filled:
            whole[place.begin : place.end].add_(flat)
        else:
            whole[place.begin : place.end].copy_(flat)
        chunk.filled.add(position)

    def _whole(self, chunk: _Chunk) -> torch.Tensor:
        """Return the buffer in which a chunk's gradients are assembled, [padded numel], waiting or working dtype."""
        if chunk.kept is not None:
            return chunk.kept.view(self.dtype_of(chunk.spec.chunk_id))[: chunk.shard.whole_numel]
        assert chunk.slot is not None
        return chunk.slot.sent.view(chunk.spec.dtype)[: chunk.shard.whole_numel]

    def _exchange_next(self) -> None:
        """Exchange the next chunk in the order, even if its gradients are incomplete."""
        chunk = self._order[self._num_gone]
        if self._has_slot(chunk):
            slot, chunk.slot = chunk.slot, None
            assert slot is not None
            self._exchange.send(chunk.spec, chunk.shard, slot)
            chunk.filled.clear()
        else:
            self._exchange.send_in_pieces(chunk.spec, chunk.shard, chunk.waiting)
            chunk.waiting.clear()
        chunk.has_gone = True
        self._num_gone += 1

    def _has_slot(self, chunk: _Chunk) -> bool:
        """Give a chunk that has none an empty slot and what waits for it, if one can be had; return whether it has.

        The last slot is kept for the chunk whose turn it is: without one it could never go, nor any after it.
        """
        if chunk.slot is not None:
            return True
        if not self._exchange.fits(chunk.spec, chunk.shard):
            return False
        turn = self._order[self._num_gone]
        chunk.slot = self._exchange.claim(num_left=0 if turn is chunk or turn.slot is not None else 1)
        if chunk.slot is None:
            return False
        self._whole(chunk).zero_()
        for position, flat in chunk.waiting.items():
            self._fill(chunk, position, flat)
        chunk.waiting.clear()
        return True

    # ---------------------------------------------------------------- on arrival

    def _put_mean(self, spec: ChunkSpec, shard: ChunkShard, mean: torch.Tensor) -> None:
        """Hand the mean of this rank's shard of a chunk's gradients on."""
        if not self._is_taking_means:
            self._shards.begin_backward()
            self._is_taking_means = True
        for position, piece in enumerate(cut_spec(spec, shard).places):
            self._put_shard(spec.chunk_id, position, mean[piece.begin : piece.end])

    def _end_means(self) -> None:
        """Deliver the means of all running exchanges."""
        self._exchange.finish()
        if self._is_taking_means:
            self._shards.end_backward()
            self._is_taking_means = False

    # ---------------------------------------------------------------- between backward and update

    def finish(self) -> None:
        """Block until every gradient has reached its home on all ranks, and all ranks know which gradients exist.

        Raises:
            CollectiveError: a rank did not take part.
        """
        if self._agreed_sums is not None:
            return
        self.end_backward()
        for chunk in self._chunks.values():
            if chunk.kept is not None:
                places = ((i, chunk.spec.places[i]) for i in sorted(chunk.filled))
                gradients = {i: self._whole(chunk)[place.begin : place.end] for i, place in places}
                self._exchange.send_in_pieces(chunk.spec, chunk.shard, gradients)
                chunk.filled.clear()
        self._end_means()
        self._shards.finish()
        with_latecomers = self._agree()
        for chunk in with_latecomers:
            self._exchange.send_in_pieces(chunk.spec, chunk.shard, chunk.late)
            chunk.late.clear()
        if with_latecomers:
            self._end_means()
            self._shards.finish()
            self._agree()

    def _agree(self) -> list[_Chunk]:
        """Share all sums of squares with all ranks; return the chunks for which any rank has late gradients."""
        own = self._shards.sums_of_squares()
        chunks = list(self._chunks.values())
        params = [place.spec for chunk in chunks for place in chunk.spec.places]
        names = [param.name for param in params]
        is_here = [i in chunk.delivered for chunk in chunks for i in range(len(chunk.spec.places))]
        is_late = [bool(chunk.late) for chunk in chunks]
        found = [*(own.get(name, 0.0) for name in names), *is_here, *is_late, self.hyper_fingerprint]
        table = self._group.gather_values(torch.tensor(found, dtype=torch.float64), name="norms of gradients")
        parts = torch.split(table, [len(names), len(names), len(chunks), 1], dim=1)
        sums, is_anywhere, is_late_anywhere, fingerprints = parts
        if not fingerprints.eq(fingerprints[0]).all():
            raise ConfigError(
                "HybridAdam: ranks have different hyper-parameters, max_grad_norm or step counts: give all ranks "
                "the same values; give a scheduler that follows the loss the mean loss of all ranks"
            )
        with_gradient = is_anywhere.any(dim=0).tolist()
        grid = self._group.grid  # replicas have the same sums, and so have tensor ranks where they hold copies
        sums = sums.view(grid.num_tensor_ranks, grid.num_replicas * grid.num_shards, -1)[:, : grid.num_shards]
        self._agreed_sums = {
            param.name: _exact_sum(sums[: 1 if param.split is None else None, :, i].reshape(-1).tolist())
            for i, param in enumerate(params)
            if with_gradient[i]
        }
        return [chunk for chunk, is_any in zip(chunks, is_late_anywhere.any(dim=0).tolist(), strict=True) if is_any]

    def sums_of_squares(self) -> dict[str, float]:
        """Return the sum of squares of each gradient that any rank has, over all shards, by parameter name.

        The same bits on all ranks; NaN where a gradient is not finite. Scaled by the square of the loss scale, if there
        is one.
        """
        self.finish()
        assert self._agreed_sums is not None
        return self._agreed_sums

    def discard(self, chunk_id: int, position: int) -> None:
        """Refuse: ranks have exchanged the gradient, in part or in whole."""
        name = self._chunks[chunk_id].spec.places[position].spec.name
        raise ModelError(
            f"parameter {name}: its gradient waits in shards on several ranks and cannot be replaced through .grad; "
            "drop all gradients with zero_grad(), or change them in backward with param.register_hook"
        )

    def names(self) -> set[str]:
        """Return the parameters that have a gradient on any rank."""
        return set(self.sums_of_squares())

    def clear(self) -> None:
        """Forget all gradients; starts nothing that other ranks must take part in."""
        self.backward_pass.end()
        self._order, self._num_gone = [], 0  # of a backward pass that failed, some may not have gone
        self._exchange.abandon()
        self._end_means()
        self._shards.clear()
        self._agreed_sums = None
        self.num_backwards = 0
        for chunk in self._chunks.values():
            chunk.has_gone = False
            if chunk.slot is not None:
                self._exchange.give_back(chunk.slot)
                chunk.slot = None
            for found in (chunk.filled, chunk.waiting, chunk.late, chunk.delivered, chunk.earlier):
                found.clear()

    def close(self) -> None:
        """Wait for running exchanges, even if they fail, and give slots and homes back."""
        for chunk in self._chunks.values():
            if chunk.slot is not None:
                self._exchange.give_back(chunk.slot)
        self._exchange.close()
        for chunk in self._chunks.values():
            if chunk.kept is not None:
                self._transfers.free(chunk.kept, "whole gradients")
        self._chunks.clear()
        self._shards.close()

    # ---------------------------------------------------------------- as with one rank

    @property
    def direct(self) -> None:
        """None: autograd adds up the gradients of all uses."""
        return None

    def follow(self, listener: GradientListener) -> None:
        """Set the one listener for changes of gradients of shards."""
        self._shards.follow(listener)

    @property
    def accumulators(self) -> GradientAccumulators:
        """Sums on the device of one rank; none are ever opened."""
        return self._shards.accumulators

    def dtype_of(self, chunk_id: int) -> torch.dtype:
        """Return the dtype in which a chunk's gradients wait."""
        return self._shards.dtype_of(chunk_id)

    def home_of(self, chunk_id: int) -> TiledHome:
        """Return where the gradients of a chunk's shard wait."""
        return self._shards.home_of(chunk_id)


def _exact_sum(values: Sequence[float]) -> float:
    """Return a correctly rounded sum; NaN if a value is not finite."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
