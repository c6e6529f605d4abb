"""Run a system in a process of its own, of which nothing is left when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["run_child"]

ROOT = Path(__file__).parents[1]


def run_child(command: list[str], timeout_s: float) -> Any:
    """Run a child and return what its last line of JSON says; its libraries may print more.

    Args:
        command: the child.
        timeout_s: seconds after which it is ended.

    Returns:
        Whatever it printed.

    Raises:
        RuntimeError: it failed, or took too long; says why.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # the new name and the old one
        environment.setdefault(name, "expandable_segments:True")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as child:
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
