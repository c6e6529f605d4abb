"""Run a system in a process of its own, of which nothing is left when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

__all__ = ["ROOT", "ChildError", "Said", "follow_child", "run_child"]

ROOT = Path(__file__).parents[1]
"""The checkout that children import the project from."""


class Said(NamedTuple):
    """A line of JSON that a child has printed."""

    at_s: float
    """Seconds since the child was started."""
    value: Any


class ChildError(RuntimeError):
    """A child failed, or was ended because its time was over; says why.

    Args:
        why: the reason.
        said: what it had said by then.
        ended_s: seconds after which it was ended; None: it failed by itself.
    """

    def __init__(self, why: str, said: Sequence[Said], ended_s: float | None = None) -> None:
        super().__init__(why)
        self.said = tuple(said)
        self.ended_s = ended_s


def follow_child(command: list[str], deadline_of: Callable[[Sequence[Said]], float]) -> Iterator[Said]:
    """Run a child that says how far it has come, and yield what it says.

    Args:
        command: the child.
        deadline_of: what it has said so far -> seconds after its start at which it is ended unless it says more.

    Yields:
        Its lines of JSON, in order.

    Raises:
        ChildError: it failed, or its time was over.
    """
    said: list[Said] = []
    lines: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile("w+") as errors:
        start_s = time.monotonic()
        child = subprocess.Popen(
            command, env=_environment(ROOT), start_new_session=True, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        reader = threading.Thread(target=_read_lines, args=(child.stdout, lines, start_s), daemon=True)
        reader.start()
        try:
            while True:
                deadline_s = deadline_of(said)
                try:
                    found = lines.get(timeout=max(start_s + deadline_s - time.monotonic(), 0.0))
                except queue.Empty:
                    raise ChildError(f"not done after {deadline_s:.0f} s", said, deadline_s) from None
                if found is None:
                    break
                at_s, line = found
                if line.startswith(('{"', '[{"')):
                    said.append(Said(at_s, json.loads(line)))
                    yield said[-1]
            child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it has started, such as a compiler
            child.wait()
            reader.join()
        if child.returncode == -signal.SIGKILL:
            raise ChildError("killed, most likely for memory", said)
        if child.returncode:
            errors.seek(0)
            raise ChildError(reason_of(errors.read()), said)


def _read_lines(output: IO[str], lines: queue.SimpleQueue[tuple[float, str] | None], start_s: float) -> None:
    """Pass lines on, and None at the end; what the child started and left holds no end back once it is killed."""
    with output:
        for line in output:
            lines.put((time.monotonic() - start_s, line))
    lines.put(None)


def _environment(root: Path) -> dict[str, str]:
    """Return the environment of a child that imports the project from a checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # the new name and the old one
        environment.setdefault(name, "expandable_segments:True")
    return environment


def run_child(command: list[str], timeout_s: float, *, root: Path = ROOT) -> Any:
    """Run a child and return what its last line of JSON says; its libraries may print more.

    Args:
        command: the child.
        timeout_s: seconds after which it is ended.
        root: checkout to import the project from.

    Returns:
        Whatever it printed.

    Raises:
        RuntimeError: it failed, or took too long; says why.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=_environment(root), start_new_session=True, **pipes) as child:
        try:
            output, errors = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"not done after {timeout_s:.0f} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it has started, such as a compiler
    if child.returncode == -signal.SIGKILL:
        raise RuntimeError("killed, most likely for memory")
    if child.returncode:
        raise RuntimeError(reason_of(errors))
    answers = [line for line in output.splitlines() if line.startswith(('{"', '[{"'))]
    if not answers:
        raise RuntimeError("ended without a result")
    return json.loads(answers[-1])


def reason_of(errors: str) -> str:
    """Return the line of what a failed child wrote to stderr that names the error: warnings may come after it."""
    lines = [line for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception)\b", line)]
    return (named or lines or ["no message"])[-1]
