"""Updates that end at a chosen point, as when the process is killed there: by faults of the pool and of the disk.

What a process that is killed leaves is its memory file and its swap file. So a fault stops the update thread where
neither is touched any more, and the engine is closed without another step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from committed_runs import Scenario, Training, attached

from gemini.errors import GeminiError
from gemini.kernels.adam_tile import AdamTile
from gemini.kernels.journal import JournalStop, TileJournal, adam_update_partly
from gemini.kernels.pool import Ticket
from gemini.offload.home import TiledHome
from gemini.runtime.runtime import Runtime


class ProcessEnded(GeminiError):
    """Nothing more happens in this process."""


class Fault(Protocol):
    """Ends updates at a certain point."""

    def install(self, runtime: Runtime, patched: pytest.MonkeyPatch) -> None:
        """Let the coming updates of an engine end there."""


class EndInBlock:
    """Ends in the middle of a tile that is in memory, or in part; two blocks of it are new.

    Args:
        stop: where in the third block.
        num_tiles: tiles of that kind that are updated before.
    """

    def __init__(self, stop: JournalStop, *, num_tiles: int = 0) -> None:
        self.has_ended = False
        self._stop = stop
        self._num_tiles = num_tiles
        self._before: list[Ticket] = []

    def install(self, runtime: Runtime, patched: pytest.MonkeyPatch) -> None:
        submit = runtime.resources.pool.submit_adam

        def submit_or_end(tile: AdamTile, *, journal: TileJournal | None = None, **rest: Any) -> Ticket:
            if journal is not None and len(self._before) == self._num_tiles:
                for ticket in self._before:  # their threads' scratches are free again
                    ticket.wait()
                adam_update_partly(tile, journal, block=2, stop=self._stop)
                self.has_ended = True
                raise ProcessEnded
            ticket = submit(tile, journal=journal, **rest)
            if journal is not None:
                self._before.append(ticket)
            return ticket

        patched.setattr(runtime.resources.pool, "submit_adam", submit_or_end)


class EndInWrites:
    """Ends while tiles, as many as there are buffers for, are being written to disk; half of each is there."""

    def __init__(self) -> None:
        self.torn: set[tuple[int, int]] = set()
        """Tiles that were being written: chunks and places in them."""

    def install(self, runtime: Runtime, patched: pytest.MonkeyPatch) -> None:
        for chunk_id, state in runtime.states.items():
            for home in (state, runtime.core.chunks[chunk_id].home):
                self._tear_writes(chunk_id, home, patched)

    def _tear_writes(self, chunk_id: int, home: TiledHome, patched: pytest.MonkeyPatch) -> None:
        write = home.write_tile

        def write_half(tile: int, source: torch.Tensor, *, ahead: bool = False) -> EndlessMove:
            torn = torch.full_like(source, 0xAB)
            torn[: torn.numel() // 2] = source[: torn.numel() // 2]
            write(tile, torn, ahead=ahead).wait()
            self.torn.add((chunk_id, tile))
            return EndlessMove()

        patched.setattr(home, "write_tile", write_half)


class EndlessMove:
    """A way to the disk that the process does not live to see the end of; see Move."""

    def is_done(self) -> bool:
        return False

    def wait_on_host(self) -> None:
        raise ProcessEnded

    def wait_on_compute(self) -> None:
        raise ProcessEnded


@contextmanager
def step_to_commit(scenario: Scenario, directory: Path, descriptor: int, num_steps: int) -> Iterator[Training]:
    """Yield a run that has taken some steps and committed all but the last."""
    with attached(scenario, directory, descriptor) as training:
        training.train(num_steps - 1)
        training.train(num_steps, commits=False)
        yield training


def commit_and_end(training: Training, fault: Fault) -> None:
    """Commit a step whose updates end in a fault."""
    with pytest.MonkeyPatch.context() as patched:
        fault.install(training.engine.runtime, patched)
        with pytest.raises(ProcessEnded):
            _commit_and_finish(training)


def _commit_and_finish(training: Training) -> None:
    training.commit()
    training.engine.runtime.finish_updates()
