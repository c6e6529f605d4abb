"""The files of one rank, written as a plan says."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

from gemini.checkpoint.manifest import FileRecord, entry_name
from gemini.checkpoint.plan import PlannedRun, SavePlan, summary_of
from gemini.files.durable import write_durably
from gemini.files.safetensors import SafetensorsWriter
from gemini.runtime.runtime import Runtime
from gemini.weights.values import read_parts

__all__ = ["RankFiles"]


class RankFiles:
    """Writes the data that a rank saves, one tile at a time, from its tiers.

    Args:
        runtime: the engine's.
        plan: what to write.
        place: the directory of all ranks' files.
        run_state: content of the file of everything else, which is written at once.

    Raises:
        OffloadIOError: a file cannot be made or written.
    """

    def __init__(self, runtime: Runtime, plan: SavePlan, place: Path, run_state: bytes) -> None:
        self.plan = plan
        self._runtime = runtime
        self._run_state = FileRecord(len(run_state), zlib.crc32(run_state), {})
        write_durably(place / plan.run_state_name, run_state)
        self._weights = SafetensorsWriter(place / plan.weights_name, plan.weights)

    def write(self, runs: Iterable[PlannedRun]) -> None:
        """Write some of the plan's runs.

        Args:
            runs: which, in the order in which they are read.

        Raises:
            OffloadIOError: something could not be read or written.
        """
        for run in runs:
            for part in read_parts(self._runtime, self._runtime.layout.place_by_name[run.param]):
                for kind, values in part.items():
                    self._weights.append(entry_name(kind, run.param), values)

    def close(self) -> None:
        """Wait until everything is on the drive; all runs have been written."""
        self._weights.close()

    def abort(self) -> None:
        """Close the files as they are; idempotent."""
        self._weights.abort()

    @property
    def summary(self) -> list[int]:
        """Summary of the written files for the first rank; see `summary_of`."""
        return summary_of(self.plan, self._weights.checksums, self._run_state)
