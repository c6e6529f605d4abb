"""Gradients on their way from autograd to where they wait for the update.

A gradient that compute memory's own tier keeps goes straight to its home. One that leaves a device travels by
chunk through a device slot and a host slot; one that waits on disk is put together in a host slot first. On
arrival at host memory the sum of squares is taken in the pass that stores or adds. Where several backward passes
make a step and the device has room, they are summed there first, see [Note: Accumulators].

Gradients are consumed by the update: after `clear` there are none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from gemini.autograd.backward_pass import BackwardPass
from gemini.autograd.gradient_sink import GradientPlace
from gemini.chunk.layout import ChunkSpec
from gemini.gradients.accumulators import GradientAccumulators
from gemini.gradients.arrivals import ArrivedGradients, GradientListener, second_gradient_error
from gemini.gradients.chunk_gradients import GradChunk
from gemini.gradients.disk_slots import Departure, GradientSlot
from gemini.kernels.cpu import GradMode
from gemini.kernels.device import DeviceKernels
from gemini.kernels.pool import GradTicket
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.tiers import MemoryTier

__all__ = ["GradientStore"]

MAX_JOBS_IN_FLIGHT = 4
"""Gradients whose autograd buffers may be alive at once while the worker pool stores them."""


class GradientStore:
    """All gradients of one engine.

    Args:
        resources: memory, disk, threads and copy engine; not closed here.
        device_kernels: store gradients that stay on the device.
        grad_dtype_of: dtype in which a chunk's gradients wait.
        num_slots: slots of each kind.
        device_slot_nbytes: bytes of a slot between device and host; 0 if none travel there.
        disk_slot_nbytes: bytes of a slot between host and disk; 0 if none travel there.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        device_kernels: DeviceKernels,
        grad_dtype_of: Callable[[ChunkSpec], torch.dtype],
        num_slots: int,
        device_slot_nbytes: int,
        disk_slot_nbytes: int,
    ) -> None:
        self._resources = resources
        self._device_kernels = device_kernels
        self._dtype_of = grad_dtype_of
        self._chunks: dict[int, GradChunk] = {}
        self.listener: GradientListener | None = None
        self.num_backwards = 0
        """Backward passes since gradients were last cleared, the one under way included."""
        self.expected_backwards = 1
        """Backward passes of the last step that was taken; the coming one probably has as many."""
        self.hyper_fingerprint = 0
        """For ShardedGradients alone."""
        self.accumulators = GradientAccumulators(resources.transfers, device_kernels)
        self.backward_pass = BackwardPass()
        self._jobs: list[GradTicket] = []
        self._device_slots: list[GradientSlot] = []
        self._staging_slots: list[GradientSlot] = []
        self._disk_slots: list[GradientSlot] = []
        if device_slot_nbytes:
            allocate = resources.transfers.allocate
            self._device_slots = [
                GradientSlot(allocate(device_slot_nbytes, "gradient slots")) for _ in range(num_slots)
            ]
            self._staging_slots = self._host_slots(num_slots, device_slot_nbytes)
        if disk_slot_nbytes:
            self._disk_slots = self._host_slots(num_slots, disk_slot_nbytes)
        self._on_device: OrderedDict[int, tuple[GradientSlot, list[int]]] = OrderedDict()
        self._departures: list[Departure] = []
        self._in_disk_slot: OrderedDict[int, GradientSlot] = OrderedDict()

    def _host_slots(self, count: int, nbytes: int) -> list[GradientSlot]:
        return [GradientSlot(self._resources.arena.allocate(nbytes, "gradient slots")) for _ in range(count)]

    def add_chunk(self, spec: ChunkSpec, home: TiledHome, tier: MemoryTier) -> None:
        """Take charge of a trainable chunk's gradients; `tier` is their home's."""
        self._chunks[spec.chunk_id] = GradChunk(spec=spec, home=home, tier=tier)

    # ---------------------------------------------------------------- during backward

    def put(self, chunk_id: int, position: int, grad: torch.Tensor) -> None:
        """Take one parameter's gradient as autograd hands it over.

        Args:
            chunk_id: the parameter's chunk.
            position: its position in the chunk's layout.
            grad: any float dtype and strides, the parameter's shape; may be freed by the caller, not written to.

        Raises:
            ModelError: a second backward pass before the update, and gradients are not kept as float32.
        """
        chunk = self._begin_delivery(chunk_id, position)
        grad = (grad.to_dense() if grad.is_sparse else grad).detach()
        if chunk.tier is MemoryTier.DEVICE:
            mode = GradMode.ADD if position in chunk.sumsq else GradMode.STORE
            view = self._view(chunk, position)
            chunk.sumsq[position] = self._device_kernels.store_gradient(view, grad.reshape(-1), mode=mode)
        elif self.expected_backwards > 1 and chunk_id in self.accumulators:
            self._accumulate(chunk, position, grad.reshape(-1))
        elif not self.can_write(chunk_id):
            self._put_in_device_slot(chunk, position, grad.reshape(-1))
        elif grad.is_contiguous():
            self._put_on_host(chunk, position, grad.view(-1))
        else:
            with self._writing(chunk, position) as place:
                place.add(slice(None), grad)

    def expect(self, chunk_id: int, position: int) -> None:
        """Expect that one more use of a parameter will deliver its gradient apart from the others'."""
        self._chunks[chunk_id].num_expected[position] += 1

    def fulfil(self, chunk_id: int, position: int) -> None:
        """Expect one use less; its gradient comes with the next `put` or `writing`."""
        chunk = self._chunks[chunk_id]
        chunk.num_expected[position] = max(0, chunk.num_expected[position] - 1)
        chunk.unfinished.add(position)

    def fulfil_all(self, chunk_id: int, position: int) -> None:
        """Expect no more uses; the sum of all their gradients comes with the next `put`."""
        del self._chunks[chunk_id].num_expected[position]
        self.finish_uses(chunk_id, position)

    def finish_uses(self, chunk_id: int, position: int) -> None:
        """Note that all uses of a parameter in this backward pass have delivered."""
        self._chunks[chunk_id].unfinished.discard(position)

    def takes_apart(self, chunk_id: int, position: int, *, num_uses: int) -> bool:
        """Return whether the sum has autograd's bits if all uses of a parameter deliver by themselves.

        To what has waited since an earlier backward pass autograd adds the sum of all uses, not one after the other.

        Args:
            chunk_id: the parameter's chunk.
            position: its position in the chunk's layout.
            num_uses: how many the pass under way may run, those that it has run included.

        Returns:
            The same throughout a pass.
        """
        self._end_failed_pass()
        chunk = self._chunks[chunk_id]
        if num_uses <= 1 and position not in chunk.delivered:
            return True
        return position not in chunk.earlier and self._dtype_of(chunk.spec) is torch.float32

    def can_write(self, chunk_id: int) -> bool:
        """Return whether `writing` is possible: a chunk's gradients wait, or are put together, where compute is."""
        is_on_host = self._resources.transfers.compute_tier is MemoryTier.HOST
        return is_on_host and self._chunks[chunk_id].tier is not MemoryTier.DEVICE

    @contextmanager
    def writing(self, chunk_id: int, position: int) -> Iterator[GradientPlace]:
        """Open the memory of a parameter's gradient to one of its uses, which adds its part; see `can_write`.

        Args:
            chunk_id: the parameter's chunk.
            position: its position in the chunk's layout.

        Yields:
            The memory, valid while the context is open and nothing else is delivered.

        Raises:
            ModelError: a second backward pass before the update, and gradients are not kept as float32.
        """
        with self._writing(self._begin_delivery(chunk_id, position), position) as place:
            yield place

    @contextmanager
    def _writing(self, chunk: GradChunk, position: int) -> Iterator[GradientPlace]:
        previous = self._claim_on_host(chunk, position)
        view = self._view(chunk, position)
        yield GradientPlace(view.view(chunk.spec.slots[position].spec.shape), is_empty=previous is None)
        self._note_arrival(chunk, position, self._resources.pool.submit_gradient(None, view, record=chunk.spec.name))

    def _begin_delivery(self, chunk_id: int, position: int) -> GradChunk:
        self._end_failed_pass()
        self.num_backwards += self.backward_pass.join(self.end_backward)
        chunk = self._chunks[chunk_id]
        self._check_accumulation(chunk, position)
        self._announce_change(chunk_id)
        chunk.delivered.add(position)
        return chunk

    def begin_backward(self) -> None:
        """Begin a backward pass that the caller ends; else the first gradient begins it and autograd ends it."""
        self.num_backwards += 1
        self.backward_pass.begin(None)

    def add(self, gradients: Sequence[tuple[int, int, torch.Tensor]]) -> None:
        """Take gradients that no backward pass delivers, as if one did; what they are is as for `put`."""
        self._end_failed_pass()
        self.begin_backward()
        for chunk_id, position, grad in gradients:
            self.put(chunk_id, position, grad)
        self.end_backward()

    def add_zeros(self, places: Sequence[tuple[int, int]], zeros: Callable[[int, int], torch.Tensor]) -> None:
        """Give gradients of zeros, which `zeros` makes, to parameters that have none."""
        for place in places:  # one after another: only some have to be in memory
            self.add([(*place, zeros(*place))])
        self.num_backwards -= len(places)

    def has(self, chunk_id: int, position: int) -> bool:
        """Return whether there has been a gradient of a parameter since gradients were last cleared."""
        chunk = self._chunks[chunk_id]
        return position in chunk.delivered or position in chunk.earlier

    def reach_unit(self, chunk_ids: Sequence[int], urgency: Callable[[int], int]) -> None:
        """Do nothing: gradients go where they wait as they come; see ShardedGradients.reach_unit."""

    def end_backward(self) -> None:
        """Send off what waits in device slots; called by autograd when a backward pass has ended."""
        self.backward_pass.end()
        while self._on_device:
            self._depart(next(iter(self._on_device)))
        for chunk in self._chunks.values():
            chunk.earlier |= chunk.delivered
            chunk.delivered.clear()
            chunk.arrived.clear()
            chunk.unfinished.clear()

    def _end_failed_pass(self) -> None:
        """Drop what only some uses of a parameter have delivered to a pass that has failed: autograd has none of it."""
        if not self.backward_pass.has_failed:
            return
        partial = {chunk_id: chunk.unfinished - chunk.earlier for chunk_id, chunk in self._chunks.items()}
        self.end_backward()
        while self._departures:
            self._arrive(self._departures.pop(0))
        for chunk_id, positions in partial.items():
            for position in positions:
                self._drop(self._chunks[chunk_id], position)

    def _drop(self, chunk: GradChunk, position: int) -> None:
        self._announce_change(chunk.spec.chunk_id)
        waiting = chunk.sumsq.pop(position, None)
        if isinstance(waiting, GradTicket):
            waiting.wait()
        self.accumulators.drop(chunk.spec.chunk_id, position)
        chunk.earlier.discard(position)

    def _check_accumulation(self, chunk: GradChunk, position: int) -> None:
        again = position in chunk.sumsq or any(d.chunk is chunk and position in d.positions for d in self._departures)
        if again and self._dtype_of(chunk.spec) is not torch.float32:
            raise second_gradient_error(chunk.spec.slots[position].spec.name, self._dtype_of(chunk.spec))

    def _accumulate(self, chunk: GradChunk, position: int, flat: torch.Tensor) -> None:
        chunk.sumsq[position] = self.accumulators.add(chunk.spec.chunk_id, position, flat)
        is_complete = len(chunk.delivered) == len(chunk.spec.slots) and not any(chunk.num_expected.values())
        if is_complete and self.num_backwards >= self.expected_backwards:
            self._send_sums(chunk)

    def _send_sums(self, chunk: GradChunk) -> None:
        """Send a chunk's sums home."""
        chunk_id, buffer = chunk.spec.chunk_id, chunk.home.host_buffer
        if chunk.tier is MemoryTier.NVME:
            self._claim_disk_slot(chunk)
            buffer = self._in_disk_slot[chunk_id].buffer
        assert buffer is not None
        self.accumulators.send(chunk_id, buffer)

    def _put_in_device_slot(self, chunk: GradChunk, position: int, flat: torch.Tensor) -> None:
        chunk_id = chunk.spec.chunk_id
        if chunk_id in self._on_device and position in self._on_device[chunk_id][1]:
            self._depart(chunk_id)  # of another use, or a backward that failed; the sum is taken on arrival
        if chunk_id not in self._on_device:
            self._on_device[chunk_id] = (self._claim_device_slot(), [])
            self._announce_change(chunk_id)  # again: claiming a slot may have brought the rest of the chunk home
        slot, positions = self._on_device[chunk_id]
        place = chunk.spec.slots[position]
        slot.buffer.view(chunk.spec.dtype)[place.begin : place.end].copy_(flat)
        positions.append(position)
        if len(positions) == len(chunk.spec.slots):
            self._depart(chunk_id)

    def _claim_device_slot(self) -> GradientSlot:
        if len(self._on_device) == len(self._device_slots):
            self._depart(next(iter(self._on_device)))
        in_use = [id(slot) for slot, _ in self._on_device.values()]
        slot = next(slot for slot in self._device_slots if id(slot) not in in_use)
        # The slot's last download starts after compute submitted before it; compute submitted now must not
        # overwrite what that download still reads.
        for departure in [d for d in self._departures if d.device_slot is slot]:
            departure.move.wait_on_compute()
        return slot

    def _depart(self, chunk_id: int) -> None:
        chunk = self._chunks[chunk_id]
        if len(self._departures) == len(self._staging_slots):
            self._arrive(self._departures.pop(0))
        slot, positions = self._on_device.pop(chunk_id)
        in_use = [id(departure.host_slot) for departure in self._departures]
        host_slot = next(slot for slot in self._staging_slots if id(slot) not in in_use)
        places = [chunk.spec.slots[position] for position in positions]
        part = slice(min(place.begin for place in places), max(place.end for place in places))
        staged, waiting = (each.buffer.view(chunk.spec.dtype)[part] for each in (host_slot, slot))
        move = self._resources.transfers.download(staged, waiting, record=chunk.spec.name)
        self._departures.append(Departure(chunk, positions, slot, host_slot, move))

    def _arrive(self, departure: Departure) -> None:
        departure.move.wait_on_host()
        spec = departure.chunk.spec
        staged = departure.host_slot.buffer.view(spec.dtype)
        tickets = []
        for position in departure.positions:
            place = spec.slots[position]
            tickets.append(self._put_on_host(departure.chunk, position, staged[place.begin : place.end]))
        for ticket in tickets:
            ticket.wait()

    def _put_on_host(self, chunk: GradChunk, position: int, flat: torch.Tensor) -> GradTicket:
        mode = GradMode.STORE if self._claim_on_host(chunk, position) is None else GradMode.ADD
        ticket = self._resources.pool.submit_gradient(
            self._view(chunk, position), flat, mode=mode, record=chunk.spec.name
        )
        self._note_arrival(chunk, position, ticket)
        return ticket

    def _claim_on_host(self, chunk: GradChunk, position: int) -> GradTicket | None:
        """Make a gradient's place in host memory ready for writing; return the job that filled it, None if empty."""
        if chunk.tier is MemoryTier.NVME:
            self._claim_disk_slot(chunk)
        previous = chunk.sumsq.get(position)
        if previous is None:
            return None
        assert isinstance(previous, GradTicket)
        previous.wait()
        return previous

    def _note_arrival(self, chunk: GradChunk, position: int, ticket: GradTicket) -> None:
        """Keep the job that gives a gradient's sum of squares, and tell the listener if it was the chunk's last."""
        chunk.sumsq[position] = ticket
        self._jobs.append(ticket)
        if len(self._jobs) > MAX_JOBS_IN_FLIGHT:
            self._jobs.pop(0).wait()
        chunk.arrived.add(position)
        is_travelling = chunk.spec.chunk_id in self._on_device or any(d.chunk is chunk for d in self._departures)
        if len(chunk.arrived) == len(chunk.spec.slots) and not any(chunk.num_expected.values()) and not is_travelling:
            self._announce(chunk)

    def _announce_change(self, chunk_id: int) -> None:
        """Tell the listener that a chunk's gradients are about to change."""
        if self.listener is not None:
            self.listener.gradients_change(chunk_id)

    def _announce(self, chunk: GradChunk) -> None:
        """Tell the listener that a chunk's gradients are all here."""
        if self.listener is None:
            return
        chunk_id = chunk.spec.chunk_id
        slot = self._in_disk_slot.get(chunk_id)
        if slot is not None:
            self._write_out(chunk_id)  # kept, in case what the listener makes of them must be done again
        tickets = tuple(ticket for ticket in chunk.sumsq.values() if isinstance(ticket, GradTicket))
        arrived = ArrivedGradients(tickets, None if slot is None else slot.buffer)
        if self.listener.gradients_complete(chunk_id, arrived) and slot is not None:
            slot.reader = chunk_id

    def _view(self, chunk: GradChunk, position: int) -> torch.Tensor:
        """Return a gradient's place in its home or, on the way to disk, in its slot; 1D, of the waiting dtype."""
        slot = self._in_disk_slot.get(chunk.spec.chunk_id)
        buffer = slot.buffer if slot is not None else chunk.home.device_buffer
        if buffer is None:
            buffer = chunk.home.host_buffer
        assert buffer is not None
        place = chunk.spec.slots[position]
        return buffer.view(self._dtype_of(chunk.spec))[place.begin : place.end]

    def _claim_disk_slot(self, chunk: GradChunk) -> None:
        chunk_id = chunk.spec.chunk_id
        if chunk_id in self._in_disk_slot:
            self._in_disk_slot.move_to_end(chunk_id)
            return
        if len(self._in_disk_slot) == len(self._disk_slots):
            self._write_out(next(iter(self._in_disk_slot)))
        in_use = [id(slot) for slot in self._in_disk_slot.values()]
        slot = next(slot for slot in self._disk_slots if id(slot) not in in_use)
        self._disk_slots.remove(slot)  # the one left longest ago comes first
        self._disk_slots.append(slot)
        if slot.reader is not None:
            assert self.listener is not None
            self.listener.leave_gradient_slot(slot.reader)
            slot.reader = None
        busy, slot.busy = slot.busy, None
        if busy is not None:
            busy.wait()
        if chunk.has_left:
            (run,) = chunk.home.runs()
            chunk.home.read_run(run, slot.buffer[: run.nbytes]).wait()
        self._in_disk_slot[chunk_id] = slot

    def _write_out(self, chunk_id: int) -> None:
        slot = self._in_disk_slot.pop(chunk_id)
        chunk = self._chunks[chunk_id]
        self.accumulators.wait(chunk_id)
        for ticket in chunk.sumsq.values():
            if isinstance(ticket, GradTicket):
                ticket.wait()
        (run,) = chunk.home.runs()
        slot.busy = chunk.home.write_run(run, slot.buffer[: run.nbytes])
        chunk.has_left = True

    # ---------------------------------------------------------------- between backward and update

    def finish(self) -> None:
        """Block until every gradient has reached its home."""
        self._end_failed_pass()
        self.end_backward()
        for chunk_id in self.accumulators.unsent():
            self._send_sums(self._chunks[chunk_id])
        while self._departures:
            self._arrive(self._departures.pop(0))
        while self._jobs:
            self._jobs.pop(0).wait()
        for chunk_id in list(self._in_disk_slot):
            self._write_out(chunk_id)
        self.accumulators.wait_all()

    def arrived(self, chunk_id: int) -> Sequence[int]:
        """Return the positions that have a gradient, in the layout's order; call `finish` first."""
        return sorted(self._chunks[chunk_id].sumsq)

    def discard(self, chunk_id: int, position: int) -> None:
        """Forget one parameter's gradient."""
        self.finish()
        self._drop(self._chunks[chunk_id], position)

    def names(self) -> set[str]:
        """Return the parameters that have a gradient."""
        self.finish()
        return {chunk.spec.slots[position].spec.name for chunk in self._chunks.values() for position in chunk.sumsq}

    def sums_of_squares(self) -> dict[str, float]:
        """Return the sum of squares of each gradient that has arrived, by parameter name; blocks on the device once.

        Infinite or NaN where a gradient is not finite. Scaled by the square of the loss scale, if there is one.
        """
        self.finish()
        chunks = self._chunks.values()
        all_sums = {chunk.spec.slots[i].spec.name: value for chunk in chunks for i, value in chunk.sumsq.items()}
        sums = {name: value.sumsq() for name, value in all_sums.items() if isinstance(value, GradTicket)}
        on_device = [(name, value) for name, value in all_sums.items() if isinstance(value, torch.Tensor)]
        if on_device:
            values = torch.stack([value for _, value in on_device]).tolist()
            sums.update(zip((name for name, _ in on_device), values, strict=True))
        return sums

    def dtype_of(self, chunk_id: int) -> torch.dtype:
        """Return the dtype in which a chunk's gradients wait."""
        return self._dtype_of(self._chunks[chunk_id].spec)

    def home_of(self, chunk_id: int) -> TiledHome:
        """Return where a chunk's gradients wait: the tiles of its state, all in one tier."""
        return self._chunks[chunk_id].home

    def clear(self) -> None:
        """Forget all gradients."""
        self.accumulators.clear()
        self.finish()
        self.num_backwards = 0
        for chunk in self._chunks.values():
            for found in (chunk.sumsq, chunk.num_expected, chunk.earlier, chunk.arrived):
                found.clear()
            chunk.has_left = False

    def close(self) -> None:
        """Give slots and homes back."""
        self._on_device.clear()
        for departure in self._departures:
            departure.move.wait_on_host()
        self._departures.clear()
        self.accumulators.close()
        for slot in self._device_slots:
            self._resources.transfers.free(slot.buffer, "gradient slots")
        for slot in self._staging_slots + self._disk_slots:
            self._resources.arena.free(slot.buffer)
        for chunk in self._chunks.values():
            chunk.home.close()
        self._device_slots, self._staging_slots, self._disk_slots = [], [], []
        self._chunks.clear()
