"""Processes that act as the ranks of a gloo group: started once, they run case after case."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from forking import fork_context
from patience import PATIENCE_S

CASE_TIMEOUT_S = 0.9 * PATIENCE_S
GROUP_TIMEOUT_S = 0.3 * PATIENCE_S
AGREED_ERRORS = {"ConfigError", "ModelError", "OffloadIOError"}
"""What construction raises once all ranks know that one of them cannot go on."""


@dataclass(frozen=True)
class Failure:
    """What a rank raised."""

    type_name: str
    message: str
    trace: str


class RankPool:
    """Groups of processes, one for each world size that was asked for."""

    def __init__(self) -> None:
        self._groups: dict[int, RankGroup] = {}

    def run(self, world_size: int, case: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Call `case(**arguments)` on every rank; return what each returned. A rank that raises fails the test."""
        results = self.try_run(world_size, case, **arguments)
        failures = [result for result in results if isinstance(result, Failure)]
        if failures:
            raise AssertionError("\n".join(failure.trace for failure in failures))
        return results

    def try_run(self, world_size: int, case: Callable[..., Any], **arguments: Any) -> list[Any]:
        """As `run`, but return a Failure for each rank that raises; they are not used again if they may be at odds."""
        if world_size not in self._groups:
            self._groups[world_size] = RankGroup(world_size)
        results = self._groups[world_size].call(case, arguments)
        if any(isinstance(result, Failure) and result.type_name not in AGREED_ERRORS for result in results):
            self._groups.pop(world_size).close()
        return results

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self._groups.values():
            group.close()


class RankGroup:
    """The processes of one group.

    Args:
        world_size: how many.
        timeout_s: of the group's collectives.
    """

    def __init__(self, world_size: int, *, timeout_s: float = GROUP_TIMEOUT_S) -> None:
        context = fork_context()
        self._stack = ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-")))
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, directory / "rendezvous", timeout_s), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def call(self, case: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        """Call a case on every rank and return what each returned or how it failed."""
        for connection in self.connections:
            connection.send((case, arguments))
        return [self._result_of(rank) for rank in range(len(self.connections))]

    def _result_of(self, rank: int) -> Any:
        connection = self.connections[rank]
        if not connection.poll(CASE_TIMEOUT_S):
            return Failure("TimeoutError", f"rank {rank} gave no answer", f"rank {rank}: no answer")
        try:
            return connection.recv()
        except EOFError:
            self.processes[rank].join(PATIENCE_S)
            code = self.processes[rank].exitcode
            return Failure("Died", f"exit code {code}", f"rank {rank} died with exit code {code}")

    def close(self) -> None:
        """End all processes."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._stack.close()


def _serve(connection: Connection, rank: int, world_size: int, rendezvous: Path, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(os.fspath(rendezvous), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    while True:
        try:
            case, arguments = connection.recv()
        except EOFError:
            break
        try:
            result = case(**arguments)
        except BaseException as error:
            trace = f"rank {rank}: {traceback.format_exc()}"
            result = Failure(type(error).__name__, str(error), trace)
        connection.send(result)
    dist.destroy_process_group()
