"""Decide the homes of all chunks from sizes and budgets. Deciding never moves anything."""

from __future__ import annotations

from dataclasses import dataclass

from gemini.errors import ConfigError

__all__ = ["StaticPlacement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticPlacement:
    """Fixed fractions, counted in bytes: what is neither on the device nor on disk lives in host memory.

    Fractions are met to within one tile of a chunk's record, except that what lives on the device does so by whole
    chunks, because a parameter must be contiguous there.
    """

    param_device: float = 0.0
    """Fraction of the working-weight bytes that live on the device. Must be 0 on the CPU."""
    param_nvme: float = 0.0
    """Fraction of the working-weight bytes that live on disk."""
    state_device: float = 0.0
    """Fraction of the optimizer-state bytes that live on the device; at most `param_device`."""
    state_nvme: float = 0.0
    """Fraction of the optimizer-state bytes that live on disk."""
    grad_nvme: float = 0.0
    """Fraction of the gradient bytes that wait on disk, by whole chunks."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            fraction = getattr(self, name)
            if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
                raise ConfigError(f"StaticPlacement.{name}: expected a fraction from 0 to 1, got {fraction!r}")
        for kind in ("param", "state"):
            if getattr(self, f"{kind}_device") + getattr(self, f"{kind}_nvme") > 1:
                raise ConfigError(f"StaticPlacement: {kind}_device + {kind}_nvme must not exceed 1")
        if self.state_device > self.param_device:
            raise ConfigError("StaticPlacement: state_device must not exceed param_device: the device updates in place")
