"""Names for profilers of torch and NVIDIA: a range for each forward of a unit, a mark for its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch.profiler import record_function

from gemini.runtime.runtime import Runtime

__all__ = ["annotate"]


class Engine(Protocol):
    """The part of GeminiDDP that annotate uses."""

    @property
    def runtime(self) -> Runtime:
        """The engine's runtime."""


class _Annotator:
    """Opens and closes ranges as moments pass.

    Args:
        units: module names by unit id.
    """

    def __init__(self, units: tuple[str, ...]) -> None:
        self._units = units
        self._open: list[tuple[int, Any]] = []

    def moment(self, kind: str, unit_id: int) -> None:
        """React to a moment; see MomentListener."""
        if kind == "enter":
            entered = record_function(f"gemini::forward {self._units[unit_id] or 'model'}")
            entered.__enter__()  # type: ignore[no-untyped-call]
            self._open.append((unit_id, entered))
        elif kind == "leave":
            if any(number == unit_id for number, _ in self._open):
                while self._close_last() != unit_id:
                    pass  # a unit that activation checkpointing has left early
        else:
            with record_function(f"gemini::{kind} {self._units[unit_id]}"):
                pass

    def close(self) -> None:
        """Close all open ranges."""
        while self._open:
            self._close_last()

    def _close_last(self) -> int:
        unit_id, entered = self._open.pop()
        entered.__exit__(None, None, None)
        return unit_id


@contextmanager
def annotate(engine: Engine) -> Iterator[None]:
    """Name the engine's work for torch.profiler and, inside `torch.autograd.profiler.emit_nvtx()`, for Nsight.

    Costs a few microseconds per unit while the context is open, and nothing otherwise. Can be used together with
    `engine.record`.

    Args:
        engine: the GeminiDDP whose units are named.

    Yields:
        Nothing.
    """
    runtime = engine.runtime
    annotator = _Annotator(tuple(unit.module_name for unit in runtime.layout.units))
    runtime.passes.moments.add(annotator)
    try:
        yield
    finally:
        runtime.passes.moments.remove(annotator)
        annotator.close()
