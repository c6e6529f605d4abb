"""Makes sure that ranks that share a model load the same, all or none."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from gemini.chunk.sharding import Sharding
from gemini.errors import CheckpointMismatchError

__all__ = ["agree_on_loading", "fingerprint_of"]


def fingerprint_of(texts: Iterable[str]) -> int:
    """Return a number of 32 bits that differs, almost surely, where texts do."""
    fingerprint = 0
    for text in texts:
        fingerprint = zlib.crc32(text.encode() + b"\0", fingerprint)
    return fingerprint


def agree_on_loading(
    sharding: Sharding | None, error: Exception | None, texts: Iterable[str], *, what: str = "names"
) -> None:
    """Let no rank load unless all can, and all load the same; with several ranks all must call.

    Args:
        sharding: the ranks; None: there are no others.
        error: why this rank cannot load.
        texts: what tells what it is about to load from anything else, in order.
        what: what these are, for the message.

    Raises:
        Exception: `error`.
        CheckpointMismatchError: another rank has an error, or was given something else.
        CollectiveError: a rank did not take part.
    """
    if sharding is not None:
        own = torch.tensor([error is not None, fingerprint_of(texts)], dtype=torch.int64)
        failed, fingerprints = sharding.group.gather_values(own, name="what is to be loaded").unbind(dim=1)
        if error is None and failed.any():
            rank = sharding.group.ranks[int(failed.argmax())]
            raise CheckpointMismatchError(f"rank {rank} cannot load what it was given and says why; nothing was loaded")
        if error is None and not fingerprints.eq(fingerprints[0]).all():
            raise CheckpointMismatchError(
                f"ranks were given different {what} to load; nothing was loaded: give all of them the same"
            )
    if error is not None:
        raise error
