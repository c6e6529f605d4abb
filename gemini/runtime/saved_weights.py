"""Weights that autograd saves in forward, and that are found again in backward in their current memory.

[Note: Saved views of weights]
Autograd saves views of weights (F.linear keeps `weight.t()`), and with them the address that the weights had in
forward. If the chunk leaves its slot, such a view points at another chunk's weights, and nothing notices it. So, while
a unit runs, tensors that are in a chunk are saved as (chunk, offset, shape, strides). In backward they are rebuilt on
the chunk's current memory; the chunk is fetched if necessary, and the use is refused if the optimizer has written it
since. Everything else goes to the hooks that were active before: the user's own, or those of activation checkpointing,
which therefore sees every tensor except weights, in forward and in recomputation. So backward needs no holds: a chunk
used by the running node is among the most recently used, which are never evicted. If a weight that is not in compute
memory is used outside its unit, it is shown in separate memory for the duration of one function
(gemini.weights.access). This is a *loan*: what autograd saves of it is also saved as a place in the chunk. So
activation checkpointing never sees a weight, whether its function runs in forward, inside a unit or outside, or again
in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gemini.chunk.chunk import Chunk
from gemini.errors import ModelError
from gemini.model.tensor_parallel import local_part, with_local_part

__all__ = ["SavedWeights"]

PackHook = Callable[[torch.Tensor], Any]
UnpackHook = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _WeightView:
    """A view of a chunk's weights that stays valid when the chunk moves."""

    chunk: Chunk
    num_updates: int
    """Number of updates of the chunk when the view was saved."""
    position: int
    """The parameter's, in the chunk."""
    version: int
    """How often the parameter had been written in place."""
    dtype: torch.dtype
    offset: int
    """First element, in elements of `dtype` from the start of the chunk."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtensor: tuple[type[torch.Tensor], Any] | None
    """Type and spec of the DTensor of which this was the local part; None: it was a plain tensor."""


@dataclass(frozen=True, slots=True)
class _Versioned:
    """A tensor and the version it had; with hooks in place autograd does not compare them, so we do."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True, slots=True)
class _Delegated:
    """A tensor packed by the hooks that were active before, with their unpack function."""

    packed: Any
    unpack: UnpackHook


def _plain_type(tensor: torch.Tensor) -> type[torch.Tensor]:
    """Return the class of a DTensor; that of a managed one is derived from it."""
    kind = type(tensor)
    return kind.__bases__[0] if hasattr(tensor, "_gemini_weight") else kind


class SavedWeights:
    """Pushes and pops the saved-tensor hooks of one engine.

    Args:
        chunk_of: the chunk whose weights a storage address holds now; None if it holds none.
        absent_in: the chunk whose placeholders a storage address holds; None if it holds none.
        weights_of: the chunk's weights in compute memory, 1D of its dtype, fetched if need be.
    """

    def __init__(
        self,
        chunk_of: Callable[[int], Chunk | None],
        absent_in: Callable[[int], Chunk | None],
        weights_of: Callable[[Chunk], torch.Tensor],
    ) -> None:
        self._chunk_of = chunk_of
        self._absent_in = absent_in
        self._weights_of = weights_of
        self._loans: dict[int, tuple[Chunk, int]] = {}

    @property
    def is_on_top(self) -> bool:
        """Whether our hooks are the innermost ones."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[1] == self._unpack

    @contextmanager
    def loan(self, values: torch.Tensor, chunk: Chunk, position: int) -> Iterator[None]:
        """Take a tensor, while the context is open, for one of a chunk's weights.

        Args:
            values: contiguous, alone in its storage, of the parameter's shape and dtype.
            chunk: the chunk.
            position: the parameter's, in the chunk.

        Yields:
            Nothing.
        """
        address = values.untyped_storage().data_ptr()
        self._loans[address] = chunk, position
        try:
            yield
        finally:
            self._loans.pop(address, None)

    def push(self) -> None:
        """Push our hooks, which pass everything except weights on to the hooks below."""
        previous: tuple[PackHook, UnpackHook] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def pack(tensor: torch.Tensor) -> Any:
            view = self._view_of(tensor)
            if view is not None:
                return view
            if previous is not None:
                return _Delegated(previous[0](tensor), previous[1])
            # A node that saves its own result must not own the result, which owns the node: nobody would free either.
            return _Versioned(tensor.detach(), tensor._version)

        torch._C._autograd._push_saved_tensors_default_hooks(pack, self._unpack)

    def pop(self) -> None:
        """Take our hooks off again."""
        torch._C._autograd._pop_saved_tensors_default_hooks()

    def drop(self, count: int) -> None:
        """Pop hooks that earlier pushes have left, if they have not been popped."""
        for _ in range(count):
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                self.pop()

    def _view_of(self, tensor: torch.Tensor) -> _WeightView | None:
        with torch._C.DisableTorchFunctionSubclass():
            local = local_part(tensor)
            is_plain = type(local) in (torch.Tensor, torch.nn.Parameter) or hasattr(tensor, "_gemini_weight")
            if not is_plain or local.layout is not torch.strided:
                return None
            place = self._place_of(local)
            if place is None:
                return None
            chunk, position, offset, strides = place
            return _WeightView(
                chunk,
                chunk.num_updates,
                position,
                chunk.params.version_of(position),
                local.dtype,
                offset,
                tuple(local.shape),
                strides,
                None if local is tensor else (_plain_type(tensor), tensor._spec),  # type: ignore[attr-defined]
            )

    def _place_of(self, local: torch.Tensor) -> tuple[Chunk, int, int, tuple[int, ...]] | None:
        """Return which weight a tensor shows: chunk, position in it, first element in the chunk, and strides."""
        address, offset = local.untyped_storage().data_ptr(), int(local.storage_offset())
        chunk = self._chunk_of(address)
        if chunk is not None:
            element = offset * local.element_size() // chunk.spec.dtype.itemsize
            return chunk, chunk.params.position_at(element), offset, tuple(local.stride())
        loan = self._loans.get(address)
        if loan is not None:
            chunk, position = loan
            begin = chunk.spec.places[position].begin * chunk.spec.dtype.itemsize // local.element_size()
            return chunk, position, begin + offset, tuple(local.stride())
        chunk = self._absent_in(address)
        if chunk is None:
            return None
        place = chunk.spec.places[offset]
        if tuple(local.shape) != place.spec.shape:
            raise ModelError(
                f"a view of parameter {place.spec.name} is saved for backward while the parameter is not in "
                "compute memory: save the parameter itself, and take views of it in backward"
            )
        return chunk, offset, place.begin, torch.empty(place.spec.shape, device="meta").stride()

    def _weights(self, saved: _WeightView) -> torch.Tensor:
        chunk = saved.chunk
        if chunk.num_updates != saved.num_updates:
            raise ModelError(
                f"backward through a graph whose weights have changed since its forward: {chunk.name} was updated "
                f"{chunk.num_updates - saved.num_updates} times; call backward before optimizer.step(), or run the "
                "forward again"
            )
        if chunk.params.version_of(saved.position) != saved.version:
            name = chunk.spec.places[saved.position].spec.name
            raise ModelError(
                f"parameter {name} was written in place between a forward and its backward, which needs the old "
                "value; write weights before forward or after backward"
            )
        view = self._weights_of(chunk).view(saved.dtype).as_strided(saved.shape, saved.strides, saved.offset)
        # With create_graph=True backward builds a graph of its own, which saves what it is given here.
        view = view.clone() if torch.is_grad_enabled() and not chunk.is_resident else view
        return view if saved.dtensor is None else with_local_part(saved.dtensor[0], view, saved.dtensor[1])

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _WeightView):
            return self._weights(packed)
        if isinstance(packed, _Delegated):
            return packed.unpack(packed.packed)
        tensor: torch.Tensor = packed.tensor
        if tensor._version != packed.version:
            raise ModelError(
                f"a tensor of shape {tuple(tensor.shape)} needed for gradient computation was modified in place after "
                f"it was saved (version {tensor._version}, expected {packed.version}); clone it before changing it"
            )
        return tensor
