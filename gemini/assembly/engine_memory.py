"""The source of an engine's memory and disk: the machine itself, or a memory service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch

from gemini.assembly.blueprint import Blueprint
from gemini.assembly.first_values import WeightSource
from gemini.assembly.shared_weights import SharedPart
from gemini.commits.file import CommitFile
from gemini.config import GeminiConfig
from gemini.offload.resources import budgets_of
from gemini.offload.swap_file import GivenFile
from gemini.tiers import MemoryTier

__all__ = ["EngineMemory", "Grant", "OwnMemory"]


class Grant(NamedTuple):
    """Resources that an engine gets in addition to plain host memory."""

    swap_file: GivenFile | None = None
    """The swap file; None if the engine makes its own."""
    commits: CommitFile | None = None
    """Keeps the engine's state beyond the process, and may hold a predecessor's; None if nothing does."""


class EngineMemory(Protocol):
    """Grants one engine memory and disk, from the first question about budgets to `close`.

    With several ranks all of them call `budgets` and `claim`. Errors are those of NodeMemory.
    """

    def budgets(self) -> dict[MemoryTier, int | None]:
        """Return the bytes per tier to plan with, as `budgets_of`."""
        ...

    def shared_parts(
        self, blueprint: Blueprint, model: torch.nn.Module, weights: WeightSource | None
    ) -> Mapping[int, SharedPart]:
        """Return which chunks are shared with other jobs, by chunk id; see find_shared_parts."""
        ...

    def claim(self, blueprint: Blueprint, shared: Iterable[SharedPart]) -> Grant:
        """Take what a blueprint says, chunks that are shared with other jobs among it; may wait for it."""
        ...

    def shared(self, part: SharedPart, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return a chunk that is shared with other jobs, uint8 [part.nbytes]; `fill` writes it if it is empty."""
        ...

    def explaining(self) -> AbstractContextManager[None]:
        """Say in an error raised inside, of another's or a damaged state, where that comes from."""
        ...

    def explaining_budget(self) -> AbstractContextManager[None]:
        """Say in an error raised inside, of a budget that is too small, where that comes from."""
        ...

    def confirm(self) -> None:
        """Say that the engine has come to be."""

    def abandon(self) -> None:
        """Give everything back because no engine came to be."""

    def close(self, *, keep: bool = False) -> None:
        """Give everything back; with `keep`, all but what would outlive the process."""


class OwnMemory:
    """The memory and disk of a configuration, without a memory service. See EngineMemory.

    Args:
        config: of the engine.
    """

    def __init__(self, config: GeminiConfig) -> None:
        self._config = config

    def budgets(self) -> dict[MemoryTier, int | None]:
        """Return the configuration's budgets, or what is free."""
        return budgets_of(self._config)

    def shared_parts(
        self, blueprint: Blueprint, model: torch.nn.Module, weights: WeightSource | None
    ) -> Mapping[int, SharedPart]:
        """Return an empty mapping: no other job is known."""
        return {}

    def claim(self, blueprint: Blueprint, shared: Iterable[SharedPart]) -> Grant:
        """Return an empty grant: the engine makes its swap file itself."""
        return Grant()

    def shared(self, part: SharedPart, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Raise KeyError: nothing is shared."""
        raise KeyError(part.key)

    def explaining(self) -> AbstractContextManager[None]:
        """Add nothing to errors."""
        return nullcontext()

    def explaining_budget(self) -> AbstractContextManager[None]:
        """Add nothing to errors."""
        return nullcontext()

    def confirm(self) -> None:
        """Do nothing: no one waits for it."""

    def abandon(self) -> None:
        """Return: nothing was taken."""

    def close(self, *, keep: bool = False) -> None:
        """Return: nothing was taken."""
