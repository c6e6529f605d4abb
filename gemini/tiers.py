"""The three memory tiers and how bytes are written down and counted.

A leaf module: it knows no tensors and moves nothing.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from gemini.errors import ConfigError, OutOfTierMemoryError

__all__ = [
    "IO_ALIGNMENT_NBYTES",
    "MemoryTier",
    "TierLedger",
    "TileGrid",
    "checksum_nbytes",
    "format_nbytes",
    "parse_nbytes",
    "round_up",
    "size_class",
]

IO_ALIGNMENT_NBYTES = 4096
"""Offsets, lengths and buffers of direct I/O are multiples of this."""

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate("KMGTP")}
_UNITS |= {f"{prefix}IB": 1024 ** (power + 1) for power, prefix in enumerate("KMGTP")}
_NBYTES_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class MemoryTier(enum.Enum):
    """Kind of memory, fastest first."""

    DEVICE = "device"
    """The accelerator's own memory. Absent when computing on the CPU."""
    HOST = "host"
    """The process's main memory."""
    NVME = "nvme"
    """The swap file."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Division of a chunk's elements into tiles, all of one length except the last."""

    numel: int
    tile_numel: int

    @property
    def num_tiles(self) -> int:
        """Number of tiles; an empty chunk has none."""
        return -(-self.numel // self.tile_numel)

    def range_of(self, tile: int) -> tuple[int, int]:
        """Return a tile's first element and the one after its last."""
        begin = tile * self.tile_numel
        return begin, min(begin + self.tile_numel, self.numel)

    def length_of(self, tile: int) -> int:
        """Return a tile's elements."""
        begin, end = self.range_of(tile)
        return end - begin


def parse_nbytes(text: str | int, *, name: str) -> int:
    """Turn "6GiB", "512 MB" or a number of bytes into bytes.

    Args:
        text: an int (bytes) or a number followed by B, KB, MB, GB, TB, PB (powers of 1000) or
            KiB, MiB, GiB, TiB, PiB (powers of 1024), in any case.
        name: the option's name, for the error message.

    Returns:
        The number of bytes, rounded down.

    Raises:
        ConfigError: the text is not of that form, or the number is not positive.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ConfigError(f'{name}: expected bytes as an int or a str such as "6GiB", got {text!r}')
    if isinstance(text, int):
        nbytes = text
    else:
        match = _NBYTES_PATTERN.fullmatch(text)
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(f'{name}: cannot read {text!r} as bytes; write for example "6GiB", "500MB" or 1048576')
        nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if nbytes <= 0:
        raise ConfigError(f"{name}: expected more than 0 bytes, got {text!r}")
    return nbytes


def format_nbytes(nbytes: float) -> str:
    """Write bytes with a binary unit and three digits, e.g. "1.50 GiB"."""
    magnitude = abs(nbytes)
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if magnitude >= 1024**power:
            return f"{nbytes / 1024**power:.2f} {unit}"
    return f"{int(nbytes)} B"


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def size_class(nbytes: int) -> int:
    """Return the bytes of a buffer that is used again for batches of other lengths: eight sizes for each doubling.

    Args:
        nbytes: bytes needed.

    Returns:
        At least `nbytes`, less than 9/8 of it if that is more than 8 pages; a multiple of the I/O alignment.
    """
    step = max(IO_ALIGNMENT_NBYTES, (1 << max(nbytes - 1, 0).bit_length()) // 16)
    return round_up(nbytes, step)


def checksum_nbytes(disk_nbytes: int) -> int:
    """Return the host memory that checksums of a swap file take: 4 bytes for each block of 4096, header included."""
    return 4 * (round_up(disk_nbytes, IO_ALIGNMENT_NBYTES) // IO_ALIGNMENT_NBYTES + 1)


class TierLedger:
    """Count the bytes a tier holds, by purpose, and refuse what its budget does not allow.

    Args:
        budgets: bytes each tier may hold; None means that the tier has no limit of its own.
    """

    def __init__(self, budgets: dict[MemoryTier, int | None]) -> None:
        self._budgets = dict(budgets)
        self._held: dict[MemoryTier, dict[str, int]] = {tier: {} for tier in MemoryTier}
        self._peak: dict[MemoryTier, int] = dict.fromkeys(MemoryTier, 0)

    def charge(self, tier: MemoryTier, purpose: str, nbytes: int) -> None:
        """Record an allocation.

        Args:
            tier: where the bytes are.
            purpose: what they are for; appears in reports.
            nbytes: how many.

        Raises:
            OutOfTierMemoryError: the tier's budget would be exceeded; nothing is recorded.
        """
        budget = self._budgets.get(tier)
        held = self.held_nbytes(tier)
        if budget is not None and held + nbytes > budget:
            raise OutOfTierMemoryError(
                f"{tier.value} tier: {format_nbytes(nbytes)} more for {purpose} exceed the budget of "
                f"{format_nbytes(budget)}, of which {format_nbytes(held)} are held; raise {tier.value}_budget or "
                "keep more in a lower tier"
            )
        by_purpose = self._held[tier]
        by_purpose[purpose] = by_purpose.get(purpose, 0) + nbytes
        self._peak[tier] = max(self._peak[tier], held + nbytes)

    def credit(self, tier: MemoryTier, purpose: str, nbytes: int) -> None:
        """Record that bytes charged before were given back."""
        remaining = self._held[tier].get(purpose, 0) - nbytes
        assert remaining >= 0, f"{tier} {purpose}: gave back more than was charged"
        self._held[tier][purpose] = remaining

    def held_nbytes(self, tier: MemoryTier) -> int:
        """Return the bytes the tier holds now."""
        return sum(self._held[tier].values())

    def peak_nbytes(self, tier: MemoryTier) -> int:
        """Return the most bytes the tier has held."""
        return self._peak[tier]

    def budget_nbytes(self, tier: MemoryTier) -> int | None:
        """Return the tier's budget; None means unlimited."""
        return self._budgets.get(tier)

    def by_purpose(self, tier: MemoryTier) -> dict[str, int]:
        """Return the bytes held now for each purpose, zero entries left out."""
        return {purpose: nbytes for purpose, nbytes in self._held[tier].items() if nbytes}
