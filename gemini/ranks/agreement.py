"""Makes sure that ranks that share a model go the same way: all or none, with the same."""

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
"""Among numbers: there is no budget."""


def fingerprint_of(texts: Iterable[str]) -> int:
    """Return a number of 32 bits that differs, almost surely, where texts do."""
    fingerprint = 0
    for text in texts:
        fingerprint = zlib.crc32(text.encode() + b"\0", fingerprint)
    return fingerprint


def agree_on_loading(sharding: Sharding, error: Exception | None, texts: Iterable[str], *, what: str = "names") -> None:
    """Let no rank load unless all can, and all load the same; with several ranks all must call.

    Args:
        sharding: the ranks.
        error: why this rank cannot load.
        texts: what tells what it is about to load from anything else, in order.
        what: what these are, for the message.

    Raises:
        Exception: `error`.
        CheckpointMismatchError: another rank has an error, or was given something else.
        CollectiveError: a rank did not take part.
    """
    own = torch.tensor([error is not None, fingerprint_of(texts)], dtype=torch.int64)
    failed, fingerprints = sharding.group.gather_values(own, name="what is to be loaded").unbind(dim=1)
    if error is not None:
        raise error
    if failed.any():
        rank = sharding.group.ranks[int(failed.argmax())]
        raise CheckpointMismatchError(f"rank {rank} cannot load what it was given and says why; nothing was loaded")
    if not fingerprints.eq(fingerprints[0]).all():
        raise CheckpointMismatchError(
            f"ranks were given different {what} to load; nothing was loaded: give all of them the same"
        )


def agree(
    sharding: Sharding,
    error: Exception | None,
    values: Sequence[int] = (),
    *,
    what: str = "the checkpoint",
    error_type: type[GeminiError] = CheckpointError,
) -> list[list[int]]:
    """Exchange some numbers, unless a rank has failed; with several ranks all must call.

    Args:
        sharding: the ranks.
        error: why this rank has failed, None if it has not.
        values: this rank's numbers, as many on all ranks.
        what: what may have failed, for messages.
        error_type: what to raise when it has on another rank.

    Returns:
        Each rank's numbers.

    Raises:
        Exception: `error`, if there is one.
        GeminiError: of `error_type`: another rank has failed.
        CollectiveError: a rank has died, stalled or gone another way.
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
        del error  # it refers to this frame, which would keep everything that its traceback knows
    if not all(row[0] for row in table):
        failed = [str(rank) for rank, row in zip(sharding.group.ranks, table, strict=True) if not row[0]]
        raise error_type(f"{what} has failed on rank {', '.join(failed)}; see the error there")
    return [row[1:] for row in table]


@contextmanager
def on_all_ranks(
    sharding: Sharding, *, what: str = "the checkpoint", error_type: type[GeminiError] = CheckpointError
) -> Iterator[None]:
    """Raise, if what is inside has failed on some rank, on all of them; see `agree`."""
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    try:
        agree(sharding, error, what=what, error_type=error_type)
    finally:
        del error  # as there


def least_of(group: ShardGroup, budgets: Mapping[Tier, int | None], *, name: str = "budgets") -> dict[Tier, int | None]:
    """Return the least of all ranks' budgets; all must call.

    Args:
        group: the ranks.
        budgets: this rank's, bytes; None: there is none, on all ranks.
        name: what they are, for messages.

    Returns:
        The same on all ranks.

    Raises:
        CollectiveError: a rank did not take part.
    """
    own = torch.tensor([NO_BUDGET if nbytes is None else nbytes for nbytes in budgets.values()], dtype=torch.int64)
    least = group.gather_values(own, name=name).min(dim=0).values.tolist()
    return {tier: None if n == NO_BUDGET else int(n) for tier, n in zip(budgets, least, strict=True)}
