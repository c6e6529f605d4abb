"""The way of gradients from a device to host memory: chunk by chunk, through a device slot and a host slot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gemini.gradients.chunk_gradients import GradChunk
from gemini.gradients.slots import GradientSlot
from gemini.kernels.pool import GradTicket
from gemini.offload.transfer import Move, Transfers

__all__ = ["DeviceRoute"]


@dataclass
class _Departure:
    """A chunk's gradients travelling from a device slot to a host slot."""

    chunk: GradChunk
    positions: list[int]
    device_slot: GradientSlot
    host_slot: GradientSlot
    move: Move


class DeviceRoute:
    """Gradients between device and host.

    Args:
        transfers: the copy engine.
        device_slots: in device memory.
        host_slots: as many, of the same size, in host memory.
        arrive: stores the gradient of a chunk's parameter, 1D in host memory, where it waits; the memory may be used
            again when the ticket is done.
        announce_change: told before more of a chunk's gradients comes.
    """

    def __init__(
        self,
        transfers: Transfers,
        device_slots: Sequence[torch.Tensor],
        host_slots: Sequence[torch.Tensor],
        *,
        arrive: Callable[[GradChunk, int, torch.Tensor], GradTicket],
        announce_change: Callable[[int], None],
    ) -> None:
        self._transfers = transfers
        self._device_slots = [GradientSlot(buffer) for buffer in device_slots]
        self._host_slots = [GradientSlot(buffer) for buffer in host_slots]
        self._arrive_at_host = arrive
        self._announce_change = announce_change
        self._on_device: OrderedDict[int, tuple[GradChunk, GradientSlot, list[int]]] = OrderedDict()
        self._departures: list[_Departure] = []

    def carries(self, chunk: GradChunk) -> bool:
        """Return whether gradients of a chunk are on their way."""
        return chunk.spec.chunk_id in self._on_device or any(d.chunk is chunk for d in self._departures)

    def has_sent(self, chunk: GradChunk, position: int) -> bool:
        """Return whether a gradient has left its device slot and not arrived."""
        return any(d.chunk is chunk and position in d.positions for d in self._departures)

    def put(self, chunk: GradChunk, position: int, flat: torch.Tensor) -> None:
        """Take a gradient; it leaves the device with the rest of its chunk, or when its slot is needed.

        Args:
            chunk: the parameter's.
            position: the parameter's, in the chunk's layout.
            flat: 1D, on the device, of any float dtype; read only.
        """
        chunk_id = chunk.spec.chunk_id
        if chunk_id in self._on_device and position in self._on_device[chunk_id][2]:
            self._depart(chunk_id)  # of another use, or a backward that failed; the sum is taken on arrival
        if chunk_id not in self._on_device:
            self._on_device[chunk_id] = (chunk, self._claim_device_slot(), [])
            self._announce_change(chunk_id)  # again: claiming a slot may have brought the rest of the chunk home
        _, slot, positions = self._on_device[chunk_id]
        place = chunk.spec.places[position]
        slot.buffer.view(chunk.spec.dtype)[place.begin : place.end].copy_(flat)
        positions.append(position)
        if len(positions) == len(chunk.spec.places):
            self._depart(chunk_id)

    def depart_all(self) -> None:
        """Send off what waits in device slots."""
        while self._on_device:
            self._depart(next(iter(self._on_device)))

    def arrive_all(self) -> None:
        """Bring home what is under way."""
        while self._departures:
            self._arrive(self._departures.pop(0))

    def _claim_device_slot(self) -> GradientSlot:
        if len(self._on_device) == len(self._device_slots):
            self._depart(next(iter(self._on_device)))
        in_use = [id(slot) for _, slot, _ in self._on_device.values()]
        slot = next(slot for slot in self._device_slots if id(slot) not in in_use)
        # The slot's last download starts after compute submitted before it; compute submitted now must not
        # overwrite what that download still reads.
        for departure in [d for d in self._departures if d.device_slot is slot]:
            departure.move.wait_on_compute()
        return slot

    def _depart(self, chunk_id: int) -> None:
        if len(self._departures) == len(self._host_slots):
            self._arrive(self._departures.pop(0))
        chunk, slot, positions = self._on_device.pop(chunk_id)
        in_use = [id(departure.host_slot) for departure in self._departures]
        host_slot = next(slot for slot in self._host_slots if id(slot) not in in_use)
        places = [chunk.spec.places[position] for position in positions]
        part = slice(min(place.begin for place in places), max(place.end for place in places))
        staged, waiting = (each.buffer.view(chunk.spec.dtype)[part] for each in (host_slot, slot))
        move = self._transfers.download(staged, waiting, record=chunk.spec.name)
        self._departures.append(_Departure(chunk, positions, slot, host_slot, move))

    def _arrive(self, departure: _Departure) -> None:
        departure.move.wait_on_host()
        spec = departure.chunk.spec
        staged = departure.host_slot.buffer.view(spec.dtype)
        tickets = []
        for position in departure.positions:
            place = spec.places[position]
            tickets.append(self._arrive_at_host(departure.chunk, position, staged[place.begin : place.end]))
        for ticket in tickets:
            ticket.wait()

    def close(self) -> None:
        """Wait for what is under way, and forget it."""
        self._on_device.clear()
        for departure in self._departures:
            departure.move.wait_on_host()
        self._departures.clear()
        self._device_slots, self._host_slots = [], []
