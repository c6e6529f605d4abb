"""When updates run beside forward and backward: a choice from what there is to hide and what has been measured."""

from __future__ import annotations

import enum

__all__ = ["CLIP_RATE_LIMIT", "OverlapMode", "choose_overlap", "smoothed_rate", "why_not_ahead"]

CLIP_RATE_LIMIT = 0.5
"""Share of clipped steps from which on updating ahead is not worth it: each clipped step does all of it again."""

RATE_WEIGHT = 0.3
"""Weight of the newest step in the share of clipped steps."""

STALL_SHARE = 0.01
"""Share of a step spent waiting for updates above which it pays to start them earlier."""


class OverlapMode(enum.Enum):
    """When updates run. All give the same bits."""

    OFF = "off"
    """Inside the optimizer's step."""
    NEXT_FORWARD = "next-forward"
    """After it, while the next forward computes."""
    SPECULATIVE = "speculative"
    """From the moment a chunk's gradients are complete, wherever that can be taken back."""


def smoothed_rate(rate: float | None, happened: bool) -> float:
    """Return the share of steps in which something happened, newer steps counting more.

    Args:
        rate: the share before this step; None: this is the first.
        happened: whether it happened in this step.

    Returns:
        The share, from 0 to 1.
    """
    return float(happened) if rate is None else (1 - RATE_WEIGHT) * rate + RATE_WEIGHT * happened


def why_not_ahead(asked: OverlapMode | None, *, has_spares: bool, clip_rate: float | None) -> str | None:
    """Say why updates do not run ahead of the step although the user wants it; None if they do, or nobody asked.

    Args:
        asked: what the user wants.
        has_spares: whether tiles have spare places to be updated ahead to.
        clip_rate: share of steps whose gradients were clipped or skipped; None before the first.

    Returns:
        The reason.
    """
    if asked is not OverlapMode.SPECULATIVE:
        return None
    if not has_spares:
        return "no tile has a second place"
    if clip_rate is None:
        return "no step has been taken"
    return "most steps clip" if clip_rate >= CLIP_RATE_LIMIT else None


def choose_overlap(
    asked: OverlapMode | None,
    *,
    has_traffic: bool,
    has_spares: bool,
    clip_rate: float | None,
    is_speculating: bool,
    stall_s: float | None,
    step_s: float | None,
) -> OverlapMode:
    """Choose how the next step's updates are to run.

    Args:
        asked: what the user wants; None: choose.
        has_traffic: whether updates wait for anything but the processor that computes: a disk, or a device beside it.
        has_spares: whether tiles have spare places to be updated ahead to.
        clip_rate: share of steps whose gradients were clipped or skipped; None before the first.
        is_speculating: whether this is how the last step's updates ran; what helped then is kept.
        stall_s: seconds that the last step waited for updates; None before the first.
        step_s: seconds that it took; None before the first.

    Returns:
        The mode. Nothing is updated ahead before the first step or while most steps clip.
    """
    may_speculate = has_spares and clip_rate is not None and clip_rate < CLIP_RATE_LIMIT
    if asked is OverlapMode.SPECULATIVE:
        return OverlapMode.SPECULATIVE if may_speculate else OverlapMode.NEXT_FORWARD
    if asked is not None:
        return asked
    if not has_traffic:
        return OverlapMode.OFF
    is_stalling = stall_s is not None and step_s is not None and stall_s > STALL_SHARE * step_s
    pays = is_speculating or is_stalling
    return OverlapMode.SPECULATIVE if may_speculate and pays else OverlapMode.NEXT_FORWARD
