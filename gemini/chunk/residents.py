"""Chunks that compute memory holds all the time: in place where that is their home, else in a copy of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gemini.chunk.chunk import Chunk, Slot, count_holders
from gemini.chunk.state import ChunkState
from gemini.errors import OutOfTierMemoryError
from gemini.offload.home import TiledHome
from gemini.offload.transfer import Transfers

__all__ = ["Residents"]


class Residents:
    """The resident chunks of one engine.

    Args:
        chunks: all chunks, by id; may grow.
        transfers: compute memory.
        evict: takes a chunk out of the slots.
        fetch: fills the buffer that a chunk has been given, and waits for it.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        transfers: Transfers,
        *,
        evict: Callable[[int], None],
        fetch: Callable[[Chunk], None],
    ) -> None:
        self._chunks = chunks
        self._transfers = transfers
        self._evict = evict
        self._fetch = fetch
        self._by_address: dict[int, Chunk] = {}  # of the storage that holds them

    def at(self, storage_address: int) -> Chunk | None:
        """Return the resident chunk whose weights a storage holds; None if it holds none."""
        return self._by_address.get(storage_address)

    def bring_in(self, chunk_id: int) -> None:
        """Bring a resident chunk into compute memory for good; a copy of what is common comes when it is first used."""
        chunk = self._chunks[chunk_id]
        assert chunk.is_resident
        assert chunk.state is ChunkState.AT_HOME
        compute_tier = self._transfers.compute_tier
        if chunk.shard is None and set(chunk.home.tiers) <= {compute_tier}:
            in_place = chunk.in_place_buffer(self._transfers.device)
            chunk.bind(in_place)
            chunk.transition(ChunkState.READY)
            self._by_address[in_place.data_ptr()] = chunk
            return
        buffer = self._transfers.allocate(chunk.slot_nbytes, "resident copies")
        chunk.slot = Slot(buffer, chunk, count_holders(buffer))
        self._by_address[buffer.data_ptr()] = chunk
        if not chunk.is_common:
            self._fetch(chunk)

    def take_in(self, chunk_id: int) -> None:
        """Give a chunk that has taken turns in the slots a copy of its own, which stays.

        Args:
            chunk_id: the chunk; not held.

        Raises:
            OutOfTierMemoryError: there is no room for the copy; the chunk goes on taking turns.
        """
        self._evict(chunk_id)
        chunk = self._chunks[chunk_id]
        chunk.is_resident = True
        try:
            self.bring_in(chunk_id)
        except OutOfTierMemoryError:
            chunk.is_resident = False
            raise

    def give_up(self, chunk_id: int) -> None:
        """Give up the copy of a resident chunk that is not held; from here on it takes turns in the slots."""
        chunk = self._chunks[chunk_id]
        assert chunk.is_resident
        assert chunk.slot is not None, f"{chunk.name} has no copy to give up"
        chunk.transition(ChunkState.AT_HOME)
        chunk.unbind()
        del self._by_address[chunk.slot.address]
        self._transfers.free(chunk.slot.buffer, "resident copies")
        chunk.slot = None
        chunk.is_resident = False

    def rehome(self, chunk_id: int, home: TiledHome, *, is_resident: bool) -> TiledHome:
        """Let a chunk live elsewhere; its weights are in the new home already.

        Args:
            chunk_id: the chunk; not held.
            home: its new home.
            is_resident: whether that is compute memory, so that it is used in place.

        Returns:
            The old home; the caller frees it.
        """
        chunk = self._chunks[chunk_id]
        if chunk.is_resident:
            chunk.transition(ChunkState.AT_HOME)
            chunk.unbind()
            self._by_address = {address: other for address, other in self._by_address.items() if other is not chunk}
        else:
            self._evict(chunk_id)
        old_home, chunk.home, chunk.is_resident = chunk.home, home, is_resident
        if is_resident:
            self.bring_in(chunk_id)
        return old_home
