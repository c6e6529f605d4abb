"""One chunk at run time: its parameters, its home and its copy in compute memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemini.chunk.cut import cut_spec
from gemini.chunk.fetch import Fetch
from gemini.chunk.layout import ChunkSpec
from gemini.chunk.shown_params import ShownParams
from gemini.chunk.state import ChunkState, ChunkUpdater, check_transition
from gemini.errors import ModelError
from gemini.offload.home import TiledHome
from gemini.profile.listeners import RunListeners
from gemini.ranks.sharding import ChunkShard

__all__ = ["Chunk", "Slot", "count_holders", "viewed_error"]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A buffer of compute memory and the chunk it holds, or will hold when its fetch has ended."""

    buffer: torch.Tensor
    """uint8 [slot bytes], page aligned, with a storage of its own."""
    chunk: Chunk
    num_holders: int
    """How many tensors and storages refer to the buffer while it shows no weights."""

    @property
    def address(self) -> int:
        """Address of the first byte; identifies the storage."""
        return self.buffer.data_ptr()


class Chunk:
    """The working weights of one chunk and the parameters that show them.

    Args:
        spec: which parameters lie where.
        params: the parameters.
        home: where the working weights live between uses.
        is_resident: whether compute memory always holds them.
        listeners: told of every change of state.
        shard: the shard that the home holds, with several ranks; None: it holds everything.
    """

    def __init__(
        self,
        spec: ChunkSpec,
        params: ShownParams,
        home: TiledHome,
        *,
        is_resident: bool,
        listeners: RunListeners,
        shard: ChunkShard | None = None,
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.home_spec = spec if shard is None else cut_spec(spec, shard)
        """The layout of what the home holds."""
        self.params = params
        self.home = home
        self.is_resident = is_resident
        self.slot: Slot | None = None
        self.fetch: Fetch | None = None
        self.updater: ChunkUpdater | None = None
        """Who ends the update under way; None: none is, or nobody else can."""
        self.last_fetch: Fetch | None = None
        """The fetch that has ended last: compute waits for its copies, which the host may not have seen end."""
        self.compute: torch.Tensor | None = None
        """The weights in compute memory, [spec.numel] of spec.dtype; None while they are away."""
        self.num_updates = 0
        """How often the optimizer has written the weights; with `params.version_of` this tells a graph that saved a
        weight whether it is still the same."""
        self.num_writes = 0
        """How often others have written one of the weights."""
        self._listeners = listeners
        self._state = ChunkState.AT_HOME
        self._num_holds = 0

    @property
    def state(self) -> ChunkState:
        """Where the chunk is in its life."""
        return self._state

    @property
    def is_held(self) -> bool:
        """Whether the chunk is held, so that it cannot move."""
        return self._num_holds > 0

    @property
    def is_ready(self) -> bool:
        """Whether compute memory holds the weights, nobody writes them, and it is not held."""
        return self._state is ChunkState.READY

    @property
    def is_common(self) -> bool:
        """Whether other ranks write what compute memory shows of it: their shards, or the home itself."""
        return self.shard is not None or self.home.is_shared

    @property
    def slot_nbytes(self) -> int:
        """Bytes of the chunk in compute memory, padding included."""
        home_nbytes = sum(self.home.tile_nbytes)
        return home_nbytes if self.shard is None else home_nbytes * self.shard.num_ranks

    def in_place_buffer(self, device: torch.device) -> torch.Tensor:
        """Return the home of a chunk that is used there, in compute memory."""
        buffer = self.home.host_buffer if self.home.device_buffer is None else self.home.device_buffer
        if buffer is None:  # no elements
            buffer = torch.empty(0, dtype=torch.uint8, device=device)
        return buffer

    def home_part(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return the bytes of a buffer of compute memory that are the home's."""
        home_nbytes = sum(self.home.tile_nbytes)
        begin = 0 if self.shard is None else home_nbytes * self.shard.rank
        return buffer[begin : begin + home_nbytes]

    @property
    def name(self) -> str:
        """What to call the chunk in messages."""
        return self.spec.name

    def transition(self, to: ChunkState) -> None:
        """Enter a state.

        Args:
            to: the state.

        Raises:
            IllegalTransitionError: the transition table does not allow it.
        """
        check_transition(self.name, self._state, to)
        self._state = to
        self._listeners.chunk_became(self.spec.chunk_id, to.value)

    def hold(self) -> None:
        """Keep the chunk where it is until `let_go`; holds nest."""
        if self._num_holds == 0:
            self.transition(ChunkState.HELD)
        self._num_holds += 1

    def let_go(self) -> bool:
        """End one hold; return whether it was the last."""
        assert self._num_holds > 0, f"{self.name}: it is not held"
        self._num_holds -= 1
        if self._num_holds == 0:
            self.transition(ChunkState.READY)
        return self._num_holds == 0

    def begin_update(self) -> None:
        """Become UPDATING; blocks while a copy, or another process, reads the home, which is about to change."""
        self.transition(ChunkState.UPDATING)
        if self.last_fetch is not None:
            self.last_fetch.wait_for_copies()
            self.last_fetch = None
        self.home.await_readers()
        self.num_updates += 1

    def drop_holds(self) -> None:
        """End all holds, after an exception has unwound whoever had them."""
        if self._num_holds:
            self._num_holds = 1
            self.let_go()

    def bind(self, buffer: torch.Tensor) -> None:
        """Let the parameters show the weights in `buffer`, uint8 in compute memory."""
        with torch.inference_mode(False):  # what is bound now may be trained with later
            self.compute = buffer[: self.spec.working_nbytes].view(self.spec.dtype)
        self.params.show_all(self.compute)

    def unbind(self) -> None:
        """Let the parameters show placeholders: scalars of the right dtype and device, a place for each parameter.

        Raises:
            ModelError: one was written in place and that cannot be honoured.
        """
        self.params.check_written()
        self.compute = None
        self.params.show_all(None)


def count_holders(buffer: torch.Tensor) -> int:
    """Return how many tensors and storages refer to a buffer's memory."""
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))


def viewed_error(chunk: Chunk) -> ModelError:
    """Return the error for a chunk that must leave its slot while its weights are looked at."""
    return ModelError(
        f"{chunk.name} has to leave its slot while a view of its weights is still held, which would show other "
        "weights from now on; clone what outlives a module's forward, call modules rather than their forward, "
        "or raise prefetch_depth, which gives more slots"
    )
