"""Agreement of ranks that share a model: all of them proceed, with the same values, or none does."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from gemini.errors import CheckpointError, CheckpointMismatchError, CollectiveError, GeminiError
from gemini.ranks.sharding import ShardGroup, Sharding

__all__ = ["agree", "agree_on_loading", "fingerprint_of", "least_of", "on_all_ranks"]

Tier = TypeVar("Tier")
NO_BUDGET = -1
"""Number that represents a missing budget."""


def fingerprint_of(texts: Iterable[str]) -> int:
    """Return a number of 32 bits that differs, almost surely, where texts do."""
    fingerprint = 0
    for text in texts:
        fingerprint = zlib.crc32(text.encode() + b"\0", fingerprint)
    return fingerprint


def agree_on_loading(sharding: Sharding, error: Exception | None, texts: Iterable[str], *, what: str = "names") -> None:
    """Make sure that all ranks can load, and load the same, before any rank loads; all ranks must call.

    Args:
        sharding: the ranks.
        error: the reason why this rank cannot load, if any.
        texts: texts that identify what this rank is about to load, in order.
        what: name of these things, for the message.

    Raises:
        Exception: `error`.
        CheckpointMismatchError: another rank has an error, or was given other texts.
        CollectiveError: a rank did not take part.
    """
    own = torch.tensor([error is not None, fingerprint_of(texts)], dtype=torch.int64)
    failed, fingerprints = sharding.group.gather_values(own, name="what is to be loaded").unbind(dim=1)
    if error is not None:
        raise error
    if failed.any():
        rank = sharding.group.ranks[int(failed.argmax())]
        raise CheckpointMismatchError(f"rank {rank} cannot load its values and reports the reason; nothing was loaded")
    if not fingerprints.eq(fingerprints[0]).all():
        raise CheckpointMismatchError(
            f"ranks were given different {what} to load; nothing was loaded: give all ranks the same"
        )


def agree(
    sharding: Sharding,
    error: Exception | None,
    values: Sequence[int] = (),
    *,
    what: str = "the checkpoint",
    error_type: type[GeminiError] = CheckpointError,
) -> list[list[int]]:
    """Exchange numbers, unless a rank has failed; all ranks must call.

    Args:
        sharding: the ranks.
        error: the failure of this rank; None if there is none.
        values: this rank's numbers; all ranks give the same count.
        what: name of the operation, for messages.
        error_type: type of error to raise when another rank has failed.

    Returns:
        Each rank's numbers.

    Raises:
        Exception: `error`, if there is one.
        GeminiError: of `error_type`: another rank has failed.
        CollectiveError: a rank has died, stalled or called something else.
    """
    if isinstance(error, CollectiveError):
        table = [[int(error is None), *values]]
    else:
        own = torch.tensor([int(error is None), *values])
        table = sharding.group.gather_values(own, name=f"what {what} takes").tolist()
    try:
        if error is not None:
            raise error
    finally:
        del error  # it refers to this frame, which would keep everything that its traceback refers to
    if not all(row[0] for row in table):
        failed = [str(rank) for rank, row in zip(sharding.group.ranks, table, strict=True) if not row[0]]
        raise error_type(f"{what} has failed on rank {', '.join(failed)}; see the error there")
    return [row[1:] for row in table]


@contextmanager
def on_all_ranks(
    sharding: Sharding, *, what: str = "the checkpoint", error_type: type[GeminiError] = CheckpointError
) -> Iterator[None]:
    """Raise on all ranks if the context's code has failed on any of them; see `agree`."""
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    try:
        agree(sharding, error, what=what, error_type=error_type)
    finally:
        del error  # as above


def least_of(group: ShardGroup, budgets: Mapping[Tier, int | None], *, name: str = "budgets") -> dict[Tier, int | None]:
    """Return the lowest budgets of all ranks; all must call.

    Args:
        group: the ranks.
        budgets: this rank's budgets in bytes; None for a tier without a budget, on all ranks.
        name: name of the budgets, for messages.

    Returns:
        The budgets, the same on all ranks.

    Raises:
        CollectiveError: a rank did not take part.
    """
    own = torch.tensor([NO_BUDGET if nbytes is None else nbytes for nbytes in budgets.values()], dtype=torch.int64)
    least = group.gather_values(own, name=name).min(dim=0).values.tolist()
    return {tier: None if n == NO_BUDGET else int(n) for tier, n in zip(budgets, least, strict=True)}
