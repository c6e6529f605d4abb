"""Sums of gradients that stay on the device while one backward pass follows another, and leave once before the update.

[Note: Accumulators]
Without accumulators, every backward pass copies its gradients to where they wait, and
GradientStore.put adds them there. An
accumulator is the same float32 sum on the device, added in the same order and so with the same bits. It is copied to
its home in the last pass, as soon as it is complete. The previous step predicts which pass is the last; if another pass
follows, the sum is copied once more. Chunks with an accumulator are resident, because a copy of the weights saves more
traffic and so gets the room first. Such chunks are never updated ahead of the step, so it does not matter when a sum
becomes complete.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemini.chunk.layout import ChunkSpec
from gemini.kernels.cpu import GradMode
from gemini.kernels.device import DeviceKernels
from gemini.offload.transfer import Move, Transfers

__all__ = ["GradientAccumulators"]

PURPOSE = "gradient accumulators"


@dataclass(slots=True, eq=False)
class _Accumulator:
    spec: ChunkSpec
    buffer: torch.Tensor
    """uint8 on the device: float32 in the order of the chunk."""
    positions: set[int]
    """Parameters of which this step has added a gradient."""
    is_home: bool = True
    """Whether all that was added has been sent home."""
    move: Move | None = None
    """On the way home, unless the buffer has been waited for since."""


class GradientAccumulators:
    """The accumulators of one engine; there are none until `open`.

    Args:
        transfers: the device's memory and copy engine.
        kernels: the device's.
    """

    def __init__(self, transfers: Transfers, kernels: DeviceKernels) -> None:
        self._transfers = transfers
        self._kernels = kernels
        self._by_chunk: dict[int, _Accumulator] = {}

    def open(self, spec: ChunkSpec) -> None:
        """Take device memory for a chunk's sums, 4 bytes an element.

        Args:
            spec: the chunk.

        Raises:
            OutOfTierMemoryError: the device has no room.
        """
        buffer = self._transfers.allocate(4 * spec.numel, PURPOSE)
        self._by_chunk[spec.chunk_id] = _Accumulator(spec, buffer, set())

    def __contains__(self, chunk_id: int) -> bool:
        return chunk_id in self._by_chunk

    @property
    def nbytes(self) -> int:
        """Device bytes that all sums take."""
        return sum(accumulator.buffer.nbytes for accumulator in self._by_chunk.values())

    def unsent(self) -> list[int]:
        """Return the chunks to whose sums something was added that has not been sent home."""
        return [chunk_id for chunk_id, accumulator in self._by_chunk.items() if not accumulator.is_home]

    def add(self, chunk_id: int, position: int, grad: torch.Tensor) -> torch.Tensor:
        """Add a gradient.

        Args:
            chunk_id: a chunk with an accumulator.
            position: the parameter's position in the chunk's layout.
            grad: 1D on the device, any float dtype.

        Returns:
            The sum of squares of the parameter's gradient so far, float32 or float64 [] on the device.
        """
        accumulator = self._by_chunk[chunk_id]
        if accumulator.move is not None:
            accumulator.move.wait_on_compute()  # it reads what is overwritten here
            accumulator.move = None
        place = accumulator.spec.places[position]
        total = accumulator.buffer.view(torch.float32)[place.begin : place.end]
        mode = GradMode.ADD if position in accumulator.positions else GradMode.STORE
        accumulator.positions.add(position)
        accumulator.is_home = False
        return self._kernels.store_gradient(total, grad, mode=mode)

    def drop(self, chunk_id: int, position: int) -> None:
        """Forget a parameter's sum, if its chunk has an accumulator."""
        accumulator = self._by_chunk.get(chunk_id)
        if accumulator is not None:
            accumulator.positions.discard(position)
            accumulator.is_home |= not accumulator.positions

    def send(self, chunk_id: int, host_buffer: torch.Tensor) -> None:
        """Start copying a chunk's sums home, those of the parameters that have a gradient.

        Args:
            chunk_id: a chunk whose sums are not home.
            host_buffer: uint8, as many bytes as the sums or more.
        """
        accumulator = self._by_chunk[chunk_id]
        places = [accumulator.spec.places[position] for position in accumulator.positions]
        part = slice(4 * min(place.begin for place in places), 4 * max(place.end for place in places))
        accumulator.move = self._transfers.download(
            host_buffer[part], accumulator.buffer[part], record=accumulator.spec.name
        )
        accumulator.is_home = True

    def wait(self, chunk_id: int) -> None:
        """Block until a chunk's sums have reached host memory, if they are on the way."""
        accumulator = self._by_chunk.get(chunk_id)
        if accumulator is not None and accumulator.move is not None:
            accumulator.move.wait_on_host()

    def wait_all(self) -> None:
        """Block until no sum is on its way."""
        for chunk_id in self._by_chunk:
            self.wait(chunk_id)

    def clear(self) -> None:
        """Forget all sums."""
        for accumulator in self._by_chunk.values():
            accumulator.positions.clear()
            accumulator.is_home = True

    def close(self) -> None:
        """Give the memory back."""
        self.wait_all()
        for accumulator in self._by_chunk.values():
            self._transfers.free(accumulator.buffer, PURPOSE)
        self._by_chunk.clear()
