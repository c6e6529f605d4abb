"""The allocated parts of a file, or of any address range.

Pure bookkeeping: moves no bytes and knows no files.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from gemini.errors import OutOfTierMemoryError
from gemini.tiers import IO_ALIGNMENT_NBYTES, format_nbytes, round_up

__all__ = ["Extent", "ExtentAllocator"]


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes; both numbers are multiples of 4096."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """First byte after the extent."""
        return self.offset + self.nbytes


class ExtentAllocator:
    """Hands out disjoint aligned extents of [0, capacity_nbytes): best fit, lowest address among equals.

    Free neighbours are merged at once, so freeing everything leaves one free extent. Allocating and freeing take time
    logarithmic in the number of free extents, plus moving list elements.

    Args:
        capacity_nbytes: bytes managed, rounded down to a multiple of 4096.

    Raises:
        ValueError: the capacity is negative.
    """

    def __init__(self, capacity_nbytes: int) -> None:
        if capacity_nbytes < 0:
            raise ValueError(f"expected a capacity >= 0 bytes, got {capacity_nbytes}")
        self._capacity_nbytes = capacity_nbytes // IO_ALIGNMENT_NBYTES * IO_ALIGNMENT_NBYTES
        self._held_nbytes = 0
        self._taken: dict[int, Extent] = {}  # by offset
        self._free_starts: dict[int, Extent] = {}  # free extents by offset
        self._free_ends: dict[int, Extent] = {}  # free extents by end
        self._free_by_fit: list[tuple[int, int]] = []  # (nbytes, offset), sorted
        if self._capacity_nbytes:
            self._add_free(Extent(0, self._capacity_nbytes))

    @property
    def capacity_nbytes(self) -> int:
        """Number of bytes managed."""
        return self._capacity_nbytes

    @property
    def held_nbytes(self) -> int:
        """Bytes of all allocated extents, rounding included."""
        return self._held_nbytes

    @property
    def free_extents(self) -> tuple[Extent, ...]:
        """Free extents in order of address; no two are neighbours."""
        return tuple(self._free_starts[offset] for offset in sorted(self._free_starts))

    def allocate(self, nbytes: int) -> Extent:
        """Take an extent.

        Args:
            nbytes: bytes needed, more than 0; rounded up to a multiple of 4096.

        Returns:
            An extent that overlaps no other allocated one.

        Raises:
            ValueError: nbytes is not positive.
            OutOfTierMemoryError: no free extent is long enough.
        """
        if nbytes <= 0:
            raise ValueError(f"expected an extent of more than 0 bytes, got {nbytes}")
        wanted = round_up(nbytes, IO_ALIGNMENT_NBYTES)
        place = bisect.bisect_left(self._free_by_fit, (wanted, 0))
        if place == len(self._free_by_fit):
            raise OutOfTierMemoryError(self._describe_shortage(wanted))
        found = self._free_starts[self._free_by_fit[place][1]]
        self._remove_free(found)
        extent = Extent(found.offset, wanted)
        if found.nbytes > wanted:
            self._add_free(Extent(extent.end, found.nbytes - wanted))
        self._taken[extent.offset] = extent
        self._held_nbytes += wanted
        return extent

    def free(self, extent: Extent) -> None:
        """Free an extent.

        Args:
            extent: an extent from allocate().

        Raises:
            ValueError: the extent is not allocated (freed twice, or from another allocator).
        """
        if not self.is_held(extent):
            raise ValueError(f"{extent} is not allocated: it was freed before or belongs to another allocator")
        del self._taken[extent.offset]
        self._held_nbytes -= extent.nbytes
        self._add_free(extent)

    def is_held(self, extent: Extent) -> bool:
        """Return whether the extent is allocated."""
        return self._taken.get(extent.offset) == extent

    def grow(self, capacity_nbytes: int) -> None:
        """Manage more bytes.

        Args:
            capacity_nbytes: the new capacity, rounded down to a multiple of 4096.

        Raises:
            ValueError: the new capacity is below the present one.
        """
        capacity = capacity_nbytes // IO_ALIGNMENT_NBYTES * IO_ALIGNMENT_NBYTES
        if capacity < self._capacity_nbytes:
            raise ValueError(f"expected at least the present {self._capacity_nbytes} bytes, got {capacity_nbytes}")
        if capacity > self._capacity_nbytes:
            self._add_free(Extent(self._capacity_nbytes, capacity - self._capacity_nbytes))
        self._capacity_nbytes = capacity

    def _add_free(self, extent: Extent) -> None:
        before = self._free_ends.get(extent.offset)
        after = self._free_starts.get(extent.end)
        for neighbour in (before, after):
            if neighbour is not None:
                self._remove_free(neighbour)
        start = extent.offset if before is None else before.offset
        end = extent.end if after is None else after.end
        merged = Extent(start, end - start)
        self._free_starts[merged.offset] = merged
        self._free_ends[merged.end] = merged
        bisect.insort(self._free_by_fit, (merged.nbytes, merged.offset))

    def _remove_free(self, extent: Extent) -> None:
        del self._free_starts[extent.offset]
        del self._free_ends[extent.end]
        del self._free_by_fit[bisect.bisect_left(self._free_by_fit, (extent.nbytes, extent.offset))]

    def _describe_shortage(self, wanted: int) -> str:
        longest = self._free_by_fit[-1][0] if self._free_by_fit else 0
        return (
            f"nvme tier: cannot allocate {format_nbytes(wanted)} ({wanted} bytes): "
            f"{format_nbytes(self._held_nbytes)} of {format_nbytes(self._capacity_nbytes)} are held and the longest "
            f"free run is {format_nbytes(longest)} ({longest} bytes); reserve more in the swap file or keep more in a "
            "faster tier"
        )
