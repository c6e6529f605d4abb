"""Which chunk is in which slot, and whose slot could be taken."""

from __future__ import annotations

from gemini.chunk.chunk import Chunk, Slot, count_holders
from gemini.chunk.state import ChunkState
from gemini.errors import OutOfTierMemoryError
from gemini.offload.slots import SlotSource
from gemini.tiers import MemoryTier, format_nbytes

__all__ = ["SlotTable"]


class SlotTable:
    """The slots that chunks without a residence take turns in.

    Args:
        source: the buffers; closed with the table.
        num_protected: how many of the chunks used last never leave.
    """

    def __init__(self, source: SlotSource, *, num_protected: int) -> None:
        self._source = source
        self._num_protected = num_protected
        self._recent: list[int] = []
        self._slots: dict[int, Slot] = {}  # those in use, by address of their storage

    def take(self, chunk: Chunk) -> Slot | None:
        """Give a chunk a slot; None if none is free."""
        buffer = self._source.acquire(chunk.slot_nbytes)
        if buffer is None:
            return None
        slot = Slot(buffer, chunk, count_holders(buffer))
        self._slots[slot.address] = slot
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free a slot whose chunk shows a placeholder again."""
        del self._slots[slot.address]
        self._source.give_back(slot.buffer)

    def find(self, storage_address: int) -> Slot | None:
        """Return the slot in use that a storage is, None if it is none."""
        return self._slots.get(storage_address)

    def chunks(self, *states: ChunkState) -> list[Chunk]:
        """Return the chunks in slots, or on their way to one, that are in one of some states; no states: all."""
        return [slot.chunk for slot in self._slots.values() if not states or slot.chunk.state in states]

    def chunk_ids(self) -> set[int]:
        """Return the chunks that are in a slot or on their way to one."""
        return {slot.chunk.spec.chunk_id for slot in self._slots.values()}

    def protect(self, chunk_id: int, *, is_used_now: bool) -> None:
        """Count a chunk among the last few used.

        Args:
            chunk_id: the chunk.
            is_used_now: whether it becomes the last one; else one that is among them keeps its turn.
        """
        if chunk_id in self._recent:
            if not is_used_now:
                return
            self._recent.remove(chunk_id)
        self._recent.append(chunk_id)
        del self._recent[: max(len(self._recent) - self._num_protected, 0)]

    def protect_none(self) -> None:
        """Let every chunk leave that nobody holds."""
        self._recent.clear()

    def evictable(self) -> set[int]:
        """Return the chunks whose slots could be taken now: not held, not just used, and seen by nobody else."""
        return {
            chunk.spec.chunk_id
            for chunk in self.chunks(ChunkState.READY)
            if chunk.spec.chunk_id not in self._recent and not self.is_viewed(chunk)
        }

    def is_viewed(self, chunk: Chunk) -> bool:
        """Return whether anyone but the chunk's own parameters looks at its slot: a node of autograd's, user code."""
        assert chunk.slot is not None
        own = len(chunk.params) + 1 if chunk.compute is not None else 0
        return self._source.reuses_buffers and count_holders(chunk.slot.buffer) > chunk.slot.num_holders + own

    def num_free(self) -> int:
        """Return how many slots are empty."""
        return self._source.num_free()

    def shortage_error(self, chunk: Chunk, tier: MemoryTier) -> OutOfTierMemoryError:
        """Return the error for a chunk that no slot can be freed for.

        Args:
            chunk: the chunk.
            tier: where the slots are.

        Returns:
            The error, not raised.
        """
        held = "; ".join(f"{slot.chunk.name} {slot.chunk.state.value}" for slot in self._slots.values())
        return OutOfTierMemoryError(
            f"cannot fetch {chunk.name}, {format_nbytes(chunk.spec.working_nbytes)}, to {tier.value} memory: all "
            f"{len(self._slots)} slots are in use ({held or 'none can be made'}); raise {tier.value}_budget"
        )

    def close(self) -> None:
        """Free every buffer."""
        self._source.close()
