"""Gradients on their way from autograd to where they wait for the update, and summed there over backward passes.

`GradientStore.put` takes one: what waits already is added to, in float32, by the pass that stores it.

A gradient goes directly to its home if the home is in compute memory. A gradient that leaves a device moves chunk by
chunk through a device slot and a host slot. A gradient that waits on disk is first assembled in a host slot. When it
arrives in host memory, its sum of squares is computed in the pass that stores or adds it. If a step has several
backward passes and the device has room, gradients are first summed there; see [Note: Accumulators].

Gradients are consumed by the update: after `clear` there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from gemini.autograd.backward_pass import BackwardPass
from gemini.autograd.gradient_sink import GradientPlace
from gemini.chunk.layout import ChunkSpec
from gemini.gradients.accumulators import GradientAccumulators
from gemini.gradients.arrivals import ArrivedGradients, DirectGradients, GradientListener, second_gradient_error
from gemini.gradients.chunk_gradients import GradChunk
from gemini.gradients.disk_slots import DiskSlots
from gemini.gradients.downloads import GradientDownloads
from gemini.kernels.cpu import GradMode
from gemini.kernels.device import DeviceKernels
from gemini.kernels.pool import GradTicket
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.ranks.sharding import ChunkShard
from gemini.tiers import MemoryTier

__all__ = ["GradientStore"]

PURPOSE = "gradient slots"
"""Purpose of their memory, in reports."""
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
        """Not used with one rank; see Gradients."""
        self.accumulators = GradientAccumulators(resources.transfers, device_kernels)
        self.backward_pass = BackwardPass()
        self._jobs: list[GradTicket] = []
        transfers, device_slots, host_slots = resources.transfers, [], []
        if device_slot_nbytes:
            device_slots = [transfers.allocate(device_slot_nbytes, PURPOSE) for _ in range(num_slots)]
            host_slots = self._allocate_on_host(num_slots, device_slot_nbytes)
        disk_slots = self._allocate_on_host(num_slots, disk_slot_nbytes) if disk_slot_nbytes else []
        self._buffers_on_device, self._buffers_on_host = device_slots, host_slots + disk_slots
        self._downloads = GradientDownloads(
            transfers, device_slots, host_slots, store=self._put_on_host, announce_change=self._announce_change
        )
        self._disk_slots = DiskSlots(disk_slots, wait_for_sums=self.accumulators.wait, leave=self._leave_slot)

    def _allocate_on_host(self, count: int, nbytes: int) -> list[torch.Tensor]:
        return [self._resources.arena.allocate(nbytes, PURPOSE) for _ in range(count)]

    @property
    def direct(self) -> DirectGradients:
        """Takes gradients that uses deliver by themselves."""
        return self

    def follow(self, listener: GradientListener) -> None:
        """Set the one listener for changes of gradients."""
        self.listener = listener

    def add_chunk(
        self,
        spec: ChunkSpec,
        home: TiledHome,
        tier: MemoryTier,
        *,
        shard: ChunkShard | None = None,
        is_kept_whole: bool = False,
    ) -> None:
        """Take charge of a trainable chunk's gradients; `tier` is their home's. Shards are for ShardedGradients."""
        assert shard is None
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
            mode = GradMode.ADD if chunk.has_waiting(position) else GradMode.STORE
            view = self._view(chunk, position)
            chunk.sumsq[position] = self._device_kernels.store_gradient(view, grad.reshape(-1), mode=mode)
        elif self.expected_backwards > 1 and chunk_id in self.accumulators:
            self._accumulate(chunk, position, grad.reshape(-1))
        elif not self.can_write(chunk_id):
            self._downloads.put(chunk, position, grad.reshape(-1))
        elif grad.is_contiguous():
            self._put_on_host(chunk, position, grad.view(-1))
        else:
            with self._writing(chunk, position) as place:
                place.add(slice(None), grad)

    def put_on_host(self, chunk_id: int, position: int, grad: torch.Tensor) -> None:
        """Take one parameter's gradient that is in host memory, wherever compute is; otherwise as `put`.

        Args:
            chunk_id: the parameter's chunk.
            position: its position in the chunk's layout.
            grad: 1D and contiguous, of any float dtype, in host memory; unchanged until it has reached its home.

        Raises:
            ModelError: as `put`.
        """
        if self._chunks[chunk_id].tier is MemoryTier.DEVICE:
            self.put(chunk_id, position, grad.to(self._resources.transfers.device))
        else:
            self._put_on_host(self._begin_delivery(chunk_id, position), position, grad)

    def expect(self, chunk_id: int, position: int) -> None:
        """Expect that one more use of a parameter will deliver its gradient apart from the others'."""
        self._chunks[chunk_id].num_expected[position] += 1

    def use_delivers(self, chunk_id: int, position: int) -> None:
        """Expect one use less; its gradient comes with the next `put` or `writing`."""
        chunk = self._chunks[chunk_id]
        chunk.num_expected[position] = max(0, chunk.num_expected[position] - 1)
        chunk.unfinished.add(position)

    def autograd_delivers(self, chunk_id: int, position: int) -> None:
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
        """Return whether `writing` is possible: a chunk's gradients wait, or are assembled, in compute memory."""
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
        yield GradientPlace(view.view(chunk.spec.places[position].spec.shape), is_empty=previous is None)
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

    def reach_unit(self, chunk_ids: Sequence[int], distance: Callable[[int], int]) -> None:
        """Do nothing: each gradient is stored when it arrives; see ShardedGradients.reach_unit."""

    def end_backward(self) -> None:
        """Send off what waits in device slots; called by autograd when a backward pass has ended."""
        self.backward_pass.end()
        self._downloads.start_all()
        for chunk in self._chunks.values():
            chunk.earlier |= chunk.delivered
            chunk.delivered.clear()
            chunk.arrived.clear()
            chunk.unfinished.clear()

    def _end_failed_pass(self) -> None:
        """Drop what only some uses of a parameter have delivered to a pass that has failed: autograd has none of it."""
        if not self.backward_pass.ends_as_failed():
            return
        partial = {chunk_id: chunk.unfinished - chunk.earlier for chunk_id, chunk in self._chunks.items()}
        self.end_backward()
        self._downloads.finish_all()
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
        again = position in chunk.sumsq or self._downloads.has_sent(chunk, position)
        if again and self._dtype_of(chunk.spec) is not torch.float32:
            raise second_gradient_error(chunk.spec.places[position].spec.name, self._dtype_of(chunk.spec))

    def _accumulate(self, chunk: GradChunk, position: int, flat: torch.Tensor) -> None:
        chunk.sumsq[position] = self.accumulators.add(chunk.spec.chunk_id, position, flat)
        is_complete = len(chunk.delivered) == len(chunk.spec.places) and not any(chunk.num_expected.values())
        if is_complete and self.num_backwards >= self.expected_backwards:
            self._send_sums(chunk)

    def _send_sums(self, chunk: GradChunk) -> None:
        """Send a chunk's sums home."""
        chunk_id, buffer = chunk.spec.chunk_id, chunk.home.host_buffer
        if chunk.tier is MemoryTier.NVME:
            buffer = self._disk_slots.claim(chunk).buffer
        assert buffer is not None
        self.accumulators.send(chunk_id, buffer)

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
            self._disk_slots.claim(chunk)
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
        is_complete = len(chunk.arrived) == len(chunk.spec.places) and not any(chunk.num_expected.values())
        if is_complete and not self._downloads.carries(chunk):
            self._announce(chunk)

    def _announce_change(self, chunk_id: int) -> None:
        """Tell the listener that a chunk's gradients are about to change."""
        if self.listener is not None:
            self.listener.gradients_change(chunk_id)

    def _leave_slot(self, chunk_id: int) -> None:
        assert self.listener is not None
        self.listener.leave_gradient_slot(chunk_id)

    def _announce(self, chunk: GradChunk) -> None:
        """Tell the listener that a chunk's gradients are complete."""
        if self.listener is None:
            return
        chunk_id = chunk.spec.chunk_id
        slot = self._disk_slots.slot_of(chunk)
        if slot is not None:
            self._disk_slots.write_out(chunk)  # kept, in case what the listener makes of them must be done again
        tickets = tuple(ticket for ticket in chunk.sumsq.values() if isinstance(ticket, GradTicket))
        arrived = ArrivedGradients(tickets, None if slot is None else slot.buffer)
        if self.listener.gradients_complete(chunk_id, arrived) and slot is not None:
            slot.reader = chunk_id

    def _view(self, chunk: GradChunk, position: int) -> torch.Tensor:
        """Return a gradient's place in its home or, on the way to disk, in its slot; 1D, of the waiting dtype."""
        slot = self._disk_slots.slot_of(chunk)
        buffer = slot.buffer if slot is not None else chunk.home.device_buffer
        if buffer is None:
            buffer = chunk.home.host_buffer
        assert buffer is not None
        place = chunk.spec.places[position]
        return buffer.view(self._dtype_of(chunk.spec))[place.begin : place.end]

    # ---------------------------------------------------------------- between backward and update

    def finish(self) -> None:
        """Block until every gradient has reached its home."""
        self._end_failed_pass()
        self.end_backward()
        for chunk_id in self.accumulators.unsent():
            self._send_sums(self._chunks[chunk_id])
        self._downloads.finish_all()
        while self._jobs:
            self._jobs.pop(0).wait()
        self._disk_slots.write_all()
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
        return {chunk.spec.places[position].spec.name for chunk in self._chunks.values() for position in chunk.sumsq}

    def sums_of_squares(self) -> dict[str, float]:
        """Return the sum of squares of each gradient that has arrived, by parameter name; blocks on the device once.

        Infinite or NaN where a gradient is not finite. Scaled by the square of the loss scale, if there is one.
        """
        self.finish()
        chunks = self._chunks.values()
        all_sums = {chunk.spec.places[i].spec.name: value for chunk in chunks for i, value in chunk.sumsq.items()}
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
        self._downloads.close()
        self.accumulators.close()
        for buffer in self._buffers_on_device:
            self._resources.transfers.free(buffer, PURPOSE)
        for buffer in self._buffers_on_host:
            self._resources.arena.free(buffer)
        for chunk in self._chunks.values():
            chunk.home.close()
        self._buffers_on_device, self._buffers_on_host = [], []
        self._chunks.clear()
