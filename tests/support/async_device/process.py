"""Tests that run in a process of their own, where the simulated device is there from the beginning.

Autograd starts its threads, one for each device, in the first backward of a process, so a device that is registered
later has none; and torch's accelerator is the process's, so other tests would find one. A wrong access to the device's
memory ends that process and fails the test.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import multiprocessing
import multiprocessing.connection
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from async_device import compiled

_MARK = "runs_on_async_device"


def on_async_device(test: Callable[..., None]) -> Callable[..., None]:
    """Let a test run where torch's accelerator is the simulated device; its arguments must be picklable."""

    @functools.wraps(test)
    def run(*args: Any, **fields: Any) -> None:
        compiled()  # or skip
        _process().call(str(Path(test.__code__.co_filename)), test.__name__, args, fields)

    setattr(run, _MARK, test)
    return run


class _Process:
    """The other process; one call at a time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._child.start()
        theirs.close()

    def call(self, file: str, name: str, args: tuple[Any, ...], fields: dict[str, Any]) -> None:
        try:
            self._pipe.send((file, name, args, fields))
            failure = self._pipe.recv()
        except EOFError:
            self._child.join()
            self.close()
            raise AssertionError(f"the process ended with {self._child.exitcode}; -11 is an access to memory") from None
        except BaseException:  # such as a time limit: what it does is not known any more
            self.close()
            raise
        if failure is not None:
            raise AssertionError(f"on the device:\n{failure}")

    def close(self) -> None:
        self._child.kill()
        self._child.join()
        self._pipe.close()
        _process.cache_clear()


@functools.cache
def _process() -> _Process:
    process = _Process()
    atexit.register(process.close)
    return process


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    import async_device

    async_device.load()
    torch.set_num_threads(1)
    while True:
        try:
            file, name, args, fields = pipe.recv()
        except EOFError:
            return
        failure = None
        try:
            getattr(getattr(_module(file), name), _MARK)(*args, **fields)
        except BaseException:
            failure = traceback.format_exc()
        pipe.send(failure)


@functools.cache
def _module(file: str) -> Any:
    """Import a test file under a name of its own."""
    name = f"on_async_device_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
