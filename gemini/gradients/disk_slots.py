"""Slots through which gradients go to disk: a chunk is assembled in a slot, which is written when needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from gemini.gradients.chunk_gradients import GradChunk
from gemini.gradients.slots import GradientSlot
from gemini.kernels.pool import GradTicket

__all__ = ["DiskSlots"]


class DiskSlots:
    """Gradients between host memory and disk.

    Args:
        buffers: the slots, in host memory.
        wait_for_sums: waits for what the device adds to a chunk's slot.
        leave: told of a chunk whose slot is about to be used for others, and which somebody may be reading there.
    """

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        *,
        wait_for_sums: Callable[[int], None],
        leave: Callable[[int], None],
    ) -> None:
        self._slots = [GradientSlot(buffer) for buffer in buffers]
        self._wait_for_sums = wait_for_sums
        self._leave = leave
        self._in_slot: OrderedDict[int, tuple[GradChunk, GradientSlot]] = OrderedDict()

    def slot_of(self, chunk: GradChunk) -> GradientSlot | None:
        """Return the slot in which a chunk's gradients are assembled; None if there is none."""
        found = self._in_slot.get(chunk.spec.chunk_id)
        return None if found is None else found[1]

    def claim(self, chunk: GradChunk) -> GradientSlot:
        """Return a slot with what of a chunk's gradients is on disk, taking one from the chunk that used it first."""
        chunk_id = chunk.spec.chunk_id
        if chunk_id in self._in_slot:
            self._in_slot.move_to_end(chunk_id)
            return self._in_slot[chunk_id][1]
        if len(self._in_slot) == len(self._slots):
            self.write_out(next(iter(self._in_slot.values()))[0])
        in_use = [id(slot) for _, slot in self._in_slot.values()]
        slot = next(slot for slot in self._slots if id(slot) not in in_use)
        self._slots.remove(slot)  # the one left longest ago comes first
        self._slots.append(slot)
        if slot.reader is not None:
            self._leave(slot.reader)
            slot.reader = None
        busy, slot.busy = slot.busy, None
        if busy is not None:
            busy.wait()
        if chunk.has_left:
            (run,) = chunk.home.runs()
            chunk.home.read_run(run, slot.buffer[: run.nbytes]).wait()
        self._in_slot[chunk_id] = (chunk, slot)
        return slot

    def write_out(self, chunk: GradChunk) -> None:
        """Begin to write a chunk's gradients home; its slot may go to others."""
        _, slot = self._in_slot.pop(chunk.spec.chunk_id)
        self._wait_for_sums(chunk.spec.chunk_id)
        for ticket in chunk.sumsq.values():
            if isinstance(ticket, GradTicket):
                ticket.wait()
        (run,) = chunk.home.runs()
        slot.busy = chunk.home.write_run(run, slot.buffer[: run.nbytes])
        chunk.has_left = True

    def write_all(self) -> None:
        """Begin to write all that is in slots."""
        for chunk, _ in list(self._in_slot.values()):
            self.write_out(chunk)
