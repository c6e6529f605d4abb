"""Activation checkpoints in host memory: the inputs of a sliced model's blocks wait there for backward.

A checkpoint is written while its block computes. It comes back one block ahead, while the next block in forward order
is differentiated. It lives as long as the graph that needs it; then its host buffer is reused.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gemini.errors import OutOfTierMemoryError
from gemini.offload.resources import Resources
from gemini.offload.transfer import Move
from gemini.tiers import format_nbytes, size_class

__all__ = ["ActivationCheckpoints"]

_MAX_SOURCES = 2
"""Maximum number of tensors kept on the device because their copies are running."""
_ALIGNMENT_NBYTES = 64
"""Alignment of tensors: kernels may sum in another order from an address that is not a multiple of it; torch allocates
at multiples."""
_LARGEST_FIT = 2
"""Largest ratio of a buffer's size to a tensor's: so batches may differ in length and still reuse buffers."""


@dataclass(slots=True)
class _HostCopy:
    """One tensor in host memory, or on its way from or to the device."""

    buffer: torch.Tensor
    """Host buffer, uint8 of the arena; it begins with the memory that the tensor spans."""
    nbytes: int
    """Length of that memory in bytes."""
    lead_nbytes: int
    """Distance in bytes of the tensor's address from the multiple of `_ALIGNMENT_NBYTES` below it."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    move: Move
    """Last copy."""
    source: torch.Tensor | None
    """Tensor on the device, until the copy to host memory is known to have ended; then None."""
    target: torch.Tensor | None = None
    """Tensor on the device, from the start of the copy back until it is handed out."""


class _Checkpoint:
    """Autograd's substitute for a tensor; its end means that the graph no longer needs the tensor."""

    def __init__(self, number: int) -> None:
        self.number = number


class ActivationCheckpoints:
    """The activation checkpoints of one engine.

    Args:
        resources: the device's transfers and the arena, which frees the buffers when it is closed.
    """

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._live: dict[int, _HostCopy] = {}  # in forward order
        self._num_made = 0
        self._leaving: deque[_HostCopy] = deque()
        self._free: list[tuple[torch.Tensor, Move]] = []

    @contextmanager
    def keeping(self, batch: torch.Tensor) -> Iterator[None]:
        """Keep one tensor in host memory if autograd saves it while the context is open; other tensors as usual.

        Args:
            batch: tensor on the device, not changed afterwards.

        Raises:
            OutOfTierMemoryError: host memory has no room for it.
        """
        top: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if batch.numel() == 0 or top is None:
            yield
            return
        previous_pack, previous_unpack = top
        key = (batch.data_ptr(), batch.shape)

        def pack(tensor: torch.Tensor) -> Any:
            return self._put(tensor) if (tensor.data_ptr(), tensor.shape) == key else previous_pack(tensor)

        def unpack(packed: Any) -> torch.Tensor:
            return self._get(packed.number) if isinstance(packed, _Checkpoint) else previous_unpack(packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _put(self, tensor: torch.Tensor) -> _Checkpoint:
        self._drop_sources(_MAX_SOURCES - 1)
        source = _spanned_memory(tensor.detach())
        nbytes = source.numel()
        buffer = self._claim(nbytes)
        move = self._resources.transfers.download(buffer[:nbytes], source, record="activations")
        copy = _HostCopy(
            buffer=buffer,
            nbytes=nbytes,
            lead_nbytes=tensor.data_ptr() % _ALIGNMENT_NBYTES,
            dtype=tensor.dtype,
            shape=tensor.shape,
            stride=tensor.stride(),
            move=move,
            source=source,
        )
        self._leaving.append(copy)
        checkpoint = _Checkpoint(self._num_made)
        self._num_made += 1
        self._live[checkpoint.number] = copy
        weakref.finalize(checkpoint, self._release, checkpoint.number)
        return checkpoint

    def _get(self, number: int) -> torch.Tensor:
        self._drop_sources(_MAX_SOURCES)
        copy = self._live[number]
        self._bring_back(copy)
        copy.move.wait_on_compute()
        tensor, copy.target = copy.target, None
        earlier = max((other for other in self._live if other < number), default=None)
        if earlier is not None:
            self._bring_back(self._live[earlier])
        assert tensor is not None
        return tensor.view(copy.dtype).as_strided(copy.shape, copy.stride)

    def _bring_back(self, copy: _HostCopy) -> None:
        """Start copying a tensor to the device, unless the copy is running."""
        if copy.target is not None:
            return
        copy.move.wait_on_compute()
        device = self._resources.transfers.device
        copy.target = torch.empty(copy.lead_nbytes + copy.nbytes, dtype=torch.uint8, device=device)[copy.lead_nbytes :]
        copy.move = self._resources.transfers.upload(copy.target, copy.buffer[: copy.nbytes], record="activations")

    def _drop_sources(self, most: int) -> None:
        """Drop device tensors that have reached host memory; wait until at most `most` have not."""
        while self._leaving and (len(self._leaving) > most or self._leaving[0].move.is_done()):
            copy = self._leaving.popleft()
            copy.move.wait_on_host()
            copy.source = None

    def _release(self, number: int) -> None:
        copy = self._live.pop(number)
        if copy.target is not None:  # it is being copied to memory that is dropped here
            copy.move.wait_on_host()
            copy.target = None
        self._free.append((copy.buffer, copy.move))

    def _claim(self, nbytes: int) -> torch.Tensor:
        """Return a buffer without running copies: a free one that fits or, in place of free ones, a new one."""
        nbytes = size_class(nbytes)
        most = _LARGEST_FIT * nbytes
        fitting = [entry for entry in self._free if nbytes <= entry[0].numel() <= most]
        if fitting:
            entry = min(fitting, key=lambda entry: entry[0].numel())
            self._free = [other for other in self._free if other is not entry]
            entry[1].wait_on_host()
            return entry[0]
        # Page-locking takes longer than copying as many bytes, so no more buffers are exchanged than needed.
        num_freed = 0
        while self._free and num_freed < nbytes:
            num_freed += self._free_oldest()
        while True:
            try:
                return self._resources.arena.allocate(nbytes, "activation checkpoints")
            except OutOfTierMemoryError as error:
                if not self._free:
                    raise OutOfTierMemoryError(
                        f"activation checkpoints: no room in host memory for {format_nbytes(nbytes)} that a block "
                        f"needs again in backward: {error}; raise GeminiConfig.checkpoint_reserve or use smaller "
                        "batches"
                    ) from error
                self._free_oldest()

    def _free_oldest(self) -> int:
        """Free the buffer that has waited longest for another use; return its bytes."""
        buffer, move = self._free.pop(0)
        move.wait_on_host()
        self._resources.arena.free(buffer)
        return buffer.numel()


def _spanned_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes between a tensor's first and last element, gaps included, as a uint8 view.

    A copy with the same alignment and strides is the same to every kernel; otherwise a kernel may sum in another order.
    """
    if tensor.numel() == 0:
        return tensor.new_empty(0, dtype=torch.uint8)
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,)).view(torch.uint8)
