"""When updates run beside forward and backward: a choice from what there is to hide and what has been measured."""

from __future__ import annotations

import enum

__all__ = ["CLIP_RATE_LIMIT", "OverlapMode", "choose_overlap", "smoothed_rate"]

CLIP_RATE_LIMIT = 0.5
"""Share of clipped steps from which on updating ahead is not worth it: each clipped step does all of it again."""

RATE_WEIGHT = 0.3
"""Weight of the newest step in the share of clipped steps."""

HIDDEN_SHARE = 0.8
"""Updates that take no longer than this share of a forward hide behind it whole."""


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


def choose_overlap(
    asked: OverlapMode | None,
    *,
    has_traffic: bool,
    has_spares: bool,
    clip_rate: float | None,
    update_s: float | None,
    forward_s: float | None,
) -> OverlapMode:
    """Choose how the next step's updates are to run.

    Args:
        asked: what the user wants; None: choose.
        has_traffic: whether updates wait for anything but the processor that computes: a disk, or a device beside it.
        has_spares: whether tiles have spare places to be updated ahead to.
        clip_rate: share of steps whose gradients were clipped or skipped; None before the first.
        update_s: seconds the last step's updates took, whether hidden or not; None before the first.
        forward_s: seconds a forward takes, without waiting for updates; None before the first.

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
    is_hidden = update_s is None or forward_s is None or update_s <= HIDDEN_SHARE * forward_s
    return OverlapMode.SPECULATIVE if may_speculate and not is_hidden else OverlapMode.NEXT_FORWARD
