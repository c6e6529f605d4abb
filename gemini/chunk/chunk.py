"""One chunk at run time: its parameters, its home and its copy in compute memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemini.chunk.fetch import Fetch
from gemini.chunk.layout import ChunkSpec, ParamSlot
from gemini.chunk.sharding import ChunkShard, cut_spec
from gemini.chunk.state import ChunkState, check_transition
from gemini.chunk.tensor_parallel import local_part, show_values
from gemini.errors import ModelError
from gemini.offload.home import TiledHome
from gemini.profile.recorder import Recorder

__all__ = ["Chunk", "Slot", "count_holders", "placeholder", "viewed_error"]


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
        params: the parameters (or plain tensors), in the order of `spec.slots`.
        home: where the working weights live between uses.
        is_resident: whether compute memory always holds them.
        shard: the shard that the home holds, with several ranks; None: it holds everything.
    """

    def __init__(
        self,
        spec: ChunkSpec,
        params: Sequence[torch.Tensor],
        home: TiledHome,
        *,
        is_resident: bool,
        shard: ChunkShard | None = None,
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.home_spec = spec if shard is None else cut_spec(spec, shard)
        """The layout of what the home holds."""
        self.params = list(params)
        self.home = home
        self.is_resident = is_resident
        self.slot: Slot | None = None
        self.fetch: Fetch | None = None
        self.last_fetch: Fetch | None = None
        """The fetch that has ended last: compute waits for its copies, which the host may not have seen end."""
        self.compute: torch.Tensor | None = None
        """The weights in compute memory, [spec.numel] of spec.dtype; None while they are away."""
        self.num_updates = 0
        """How often the weights have been written; tells a graph that saved them whether they are still the same."""
        self.recorder: Recorder | None = None
        """Told of every change of state; None: nobody is."""
        self._state = ChunkState.AT_HOME
        self._num_leases = 0
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._device_type = ""

    @property
    def state(self) -> ChunkState:
        """Where the chunk is in its life."""
        return self._state

    @property
    def is_leased(self) -> bool:
        """Whether anyone holds a lease."""
        return self._num_leases > 0

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
        if self.recorder is not None:
            self.recorder.chunk_became(self.spec.chunk_id, to.value)

    def lease(self) -> None:
        """Keep the chunk where it is until the lease is given back; leases nest."""
        if self._num_leases == 0:
            self.transition(ChunkState.LEASED)
        self._num_leases += 1

    def unlease(self) -> bool:
        """Give one lease back; return whether it was the last."""
        assert self._num_leases > 0, f"{self.name}: no lease to give back"
        self._num_leases -= 1
        if self._num_leases == 0:
            self.transition(ChunkState.READY)
        return self._num_leases == 0

    def begin_update(self) -> None:
        """Become UPDATING; blocks while a copy to the device still reads the home, which is about to change."""
        self.transition(ChunkState.UPDATING)
        if self.last_fetch is not None:
            self.last_fetch.wait_for_copies()
            self.last_fetch = None
        self.num_updates += 1

    def drop_leases(self) -> None:
        """Give all leases back, after an exception has unwound whoever held them."""
        if self._num_leases:
            self._num_leases = 1
            self.unlease()

    def bind(self, buffer: torch.Tensor) -> None:
        """Let the parameters show the weights in `buffer`, uint8 in compute memory."""
        with torch.inference_mode(False):  # what is bound now may be trained with later
            self.compute = buffer[: self.spec.working_nbytes].view(self.spec.dtype)
            for slot, param in zip(self.spec.slots, self.params, strict=True):
                show_values(param, param_view(self.compute, slot))
        self._remember_binding()

    def check_params(self) -> None:
        """Refuse parameters that were moved, cast, re-flagged or given other data behind the engine's back.

        Raises:
            ModelError: one was.
        """
        self.check_written()
        kind = (self.spec.is_trainable, self.spec.dtype, self._device_type)
        has_grad = torch.is_grad_enabled()  # without, the flag changes nothing: peft's disable_adapter() turns it off
        for slot, param, address in zip(self.spec.slots, self.params, self._addresses, strict=True):
            requires_grad = param.requires_grad if has_grad else self.spec.is_trainable
            found = (requires_grad, param.dtype, param.device.type)
            if found != kind:
                raise ModelError(
                    f"parameter {slot.spec.name} had (requires_grad, dtype, device) = {kind} when it was wrapped and "
                    f"has {found} now; set requires_grad before GeminiDDP(...), and device and dtype in GeminiConfig "
                    "instead of calling .to(), .cuda() or .half()"
                )
            if local_part(param).data_ptr() != address:
                raise ModelError(
                    f"parameter {slot.spec.name} no longer shows its chunk: its .data was replaced after "
                    "GeminiDDP(...); load values with engine.load_state_dict instead"
                )

    def unbind(self, missing: torch.Tensor) -> None:
        """Let the parameters show a placeholder, a scalar of the right dtype and device."""
        self.compute = None
        self._device_type = missing.device.type
        with torch.inference_mode(False):
            for slot, param in zip(self.spec.slots, self.params, strict=True):
                show_values(param, missing.expand(slot.spec.shape))
        self._remember_binding()

    def _remember_binding(self) -> None:
        self._addresses = [local_part(param).data_ptr() for param in self.params]
        self._versions = [_version_of(param) for param in self.params]

    def check_written(self) -> None:
        """Refuse parameters that were written in place: the home knows nothing of it, and may be all that is kept.

        Raises:
            ModelError: one was.
        """
        for slot, param, version in zip(self.spec.slots, self.params, self._versions, strict=True):
            if _version_of(param) != version:
                self._remember_binding()
                raise ModelError(
                    f"parameter {slot.spec.name} was written in place; only the optimizer and engine.load_state_dict "
                    "may change weights, which live elsewhere most of the time"
                )


def _version_of(param: torch.Tensor) -> int:
    """Return how often a parameter, or this rank's part of it, was written in place."""
    local = local_part(param)
    return param._version if local is param else param._version + local._version


def count_holders(buffer: torch.Tensor) -> int:
    """Return how many tensors and storages refer to a buffer's memory."""
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))


def param_view(flat: torch.Tensor, slot: ParamSlot) -> torch.Tensor:
    """Return a parameter's part of a chunk-sized tensor, in the parameter's shape."""
    return flat[slot.begin : slot.end].view(slot.spec.shape)


def placeholder(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the scalar that absent weights show: NaN, so that a use nobody announced cannot go unseen."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device)


def viewed_error(chunk: Chunk) -> ModelError:
    """Return the error for a chunk that must leave its slot while its weights are looked at."""
    return ModelError(
        f"{chunk.name} has to leave its slot while a view of its weights is still held, which would show other "
        "weights from now on; clone what outlives a module's forward, call modules rather than their forward, "
        "or raise prefetch_depth, which gives more slots"
    )
