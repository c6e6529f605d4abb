"""Weights that autograd saves in forward, found again in backward wherever they are then.

[Note: Saved views of weights]
Autograd saves views of weights (F.linear keeps `weight.t()`), and with them the address the weights had in forward. A
chunk that leaves its slot makes such a view point at another chunk's weights, and nothing would notice. So, while a
unit runs, tensors that lie in a chunk are saved as (chunk, offset, shape, strides) and rebuilt in backward on the
chunk's memory of that moment, fetched if need be, and refused if the optimizer has written it since. Everything else
goes to the hooks that were active before: the user's own, or those of activation checkpointing, which therefore sees
every tensor but weights, in forward and in recomputation alike. So backward needs no leases: a chunk used by the node
that is running is among the most recently used, which are never evicted. One case goes past these hooks: transformers
checkpoints `forward` inside `__call__`, inside our hooks, and recomputes it outside. There a gradient hook on the
unit's output fetches the weights first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gemini.chunk.chunk import Chunk
from gemini.chunk.tensor_parallel import local_part, with_local_part
from gemini.errors import ModelError

__all__ = ["SavedWeights"]

PackHook = Callable[[torch.Tensor], Any]
UnpackHook = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _WeightView:
    """A view of a chunk's weights, valid wherever the chunk is."""

    chunk: Chunk
    num_updates: int
    """Of the chunk, when the view was saved."""
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
    """What the hooks that were active before made of a tensor, and how they undo it."""

    packed: Any
    unpack: UnpackHook


class SavedWeights:
    """Pushes and pops the saved-tensor hooks of one engine.

    Args:
        chunk_of: the chunk whose weights a storage address holds now; None if it holds none.
        weights_of: the chunk's weights in compute memory, 1D of its dtype, fetched if need be.
    """

    def __init__(self, chunk_of: Callable[[int], Chunk | None], weights_of: Callable[[Chunk], torch.Tensor]) -> None:
        self._chunk_of = chunk_of
        self._weights_of = weights_of

    def push(self) -> None:
        """Put our hooks on top, passing on to what is there now all but weights."""
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
        """Take off what as many pushes have left behind, where nobody else has done so."""
        for _ in range(count):
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                self.pop()

    def _view_of(self, tensor: torch.Tensor) -> _WeightView | None:
        local = local_part(tensor)
        if type(local) not in (torch.Tensor, torch.nn.Parameter) or local.layout is not torch.strided:
            return None
        chunk = self._chunk_of(local.untyped_storage().data_ptr())
        if chunk is None:
            return None
        return _WeightView(
            chunk,
            chunk.num_updates,
            local.dtype,
            int(local.storage_offset()),
            tuple(local.shape),
            tuple(local.stride()),
            None if local is tensor else (type(tensor), tensor._spec),  # type: ignore[attr-defined]
        )

    def _weights(self, saved: _WeightView) -> torch.Tensor:
        chunk = saved.chunk
        if chunk.num_updates != saved.num_updates:
            raise ModelError(
                f"backward through a graph whose weights have changed since its forward: {chunk.name} was updated "
                f"{chunk.num_updates - saved.num_updates} times; call backward before optimizer.step(), or run the "
                "forward again"
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
