"""Downloads of gradients from a device to host memory, chunk by chunk, through a device slot and a host slot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gemini.gradients.chunk_gradients import GradChunk
from gemini.gradients.slots import GradientSlot
from gemini.kernels.pool import GradTicket
from gemini.offload.transfer import Move, Transfers

__all__ = ["GradientDownloads"]


@dataclass
class _Download:
    """The copy of gradients of a chunk from a device slot to a host slot."""

    chunk: GradChunk
    positions: list[int]
    device_slot: GradientSlot
    host_slot: GradientSlot
    move: Move


class GradientDownloads:
    """Downloads the gradients of chunks from the device, and stores them where they wait for the update.

    Args:
        transfers: the copy engine.
        device_slots: in device memory.
        host_slots: as many, of the same size, in host memory.
        store: stores the gradient of a chunk's parameter, 1D in host memory, where it waits; the memory may be used
            again when the ticket is done.
        announce_change: told before more of a chunk's gradients comes.
    """

    def __init__(
        self,
        transfers: Transfers,
        device_slots: Sequence[torch.Tensor],
        host_slots: Sequence[torch.Tensor],
        *,
        store: Callable[[GradChunk, int, torch.Tensor], GradTicket],
        announce_change: Callable[[int], None],
    ) -> None:
        self._transfers = transfers
        self._device_slots = [GradientSlot(buffer) for buffer in device_slots]
        self._host_slots = [GradientSlot(buffer) for buffer in host_slots]
        self._store_on_host = store
        self._announce_change = announce_change
        self._on_device: OrderedDict[int, tuple[GradChunk, GradientSlot, list[int]]] = OrderedDict()
        self._running: list[_Download] = []

    def carries(self, chunk: GradChunk) -> bool:
        """Return whether gradients of a chunk wait in a device slot or are being downloaded."""
        return chunk.spec.chunk_id in self._on_device or any(d.chunk is chunk for d in self._running)

    def has_sent(self, chunk: GradChunk, position: int) -> bool:
        """Return whether the download of a gradient has started and is not finished."""
        return any(d.chunk is chunk and position in d.positions for d in self._running)

    def put(self, chunk: GradChunk, position: int, flat: torch.Tensor) -> None:
        """Take a gradient; it leaves the device with the rest of its chunk, or when its slot is needed.

        Args:
            chunk: the parameter's.
            position: the parameter's, in the chunk's layout.
            flat: 1D, on the device, of any float dtype; read only.
        """
        chunk_id = chunk.spec.chunk_id
        if chunk_id in self._on_device and position in self._on_device[chunk_id][2]:
            self._start(chunk_id)  # of another use, or a backward that failed; the sum is taken on arrival
        if chunk_id not in self._on_device:
            self._on_device[chunk_id] = (chunk, self._claim_device_slot(), [])
            self._announce_change(chunk_id)  # again: claiming a slot may have stored the rest of the chunk
        _, slot, positions = self._on_device[chunk_id]
        place = chunk.spec.places[position]
        slot.buffer.view(chunk.spec.dtype)[place.begin : place.end].copy_(flat)
        positions.append(position)
        if len(positions) == len(chunk.spec.places):
            self._start(chunk_id)

    def start_all(self) -> None:
        """Start the downloads of all gradients that wait in device slots."""
        while self._on_device:
            self._start(next(iter(self._on_device)))

    def finish_all(self) -> None:
        """Finish all downloads that are under way."""
        while self._running:
            self._finish(self._running.pop(0))

    def _claim_device_slot(self) -> GradientSlot:
        if len(self._on_device) == len(self._device_slots):
            self._start(next(iter(self._on_device)))
        in_use = [id(slot) for _, slot, _ in self._on_device.values()]
        slot = next(slot for slot in self._device_slots if id(slot) not in in_use)
        # The slot's last download starts after compute submitted before it; compute submitted now must not
        # overwrite what that download still reads.
        for download in [d for d in self._running if d.device_slot is slot]:
            download.move.wait_on_compute()
        return slot

    def _start(self, chunk_id: int) -> None:
        if len(self._running) == len(self._host_slots):
            self._finish(self._running.pop(0))
        chunk, slot, positions = self._on_device.pop(chunk_id)
        in_use = [id(download.host_slot) for download in self._running]
        host_slot = next(slot for slot in self._host_slots if id(slot) not in in_use)
        places = [chunk.spec.places[position] for position in positions]
        part = slice(min(place.begin for place in places), max(place.end for place in places))
        staged, waiting = (each.buffer.view(chunk.spec.dtype)[part] for each in (host_slot, slot))
        move = self._transfers.download(staged, waiting, record=chunk.spec.name)
        self._running.append(_Download(chunk, positions, slot, host_slot, move))

    def _finish(self, download: _Download) -> None:
        download.move.wait_on_host()
        spec = download.chunk.spec
        staged = download.host_slot.buffer.view(spec.dtype)
        tickets = []
        for position in download.positions:
            place = spec.places[position]
            tickets.append(self._store_on_host(download.chunk, position, staged[place.begin : place.end]))
        for ticket in tickets:
            ticket.wait()

    def close(self) -> None:
        """Wait for what is under way, and forget it."""
        self._on_device.clear()
        for download in self._running:
            download.move.wait_on_host()
        self._running.clear()
        self._device_slots, self._host_slots = [], []
