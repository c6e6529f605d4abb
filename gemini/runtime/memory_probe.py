"""Measures the memory of everything except chunks: activations, temporaries, gradients still held by autograd.

On an accelerator the allocator knows. On the CPU and the simulated device a dispatch mode counts the storages that
operations create; it slows every operation down, so it runs only inside `trace`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemini.model.outputs import tensors_in
from gemini.offload.accelerator import Accelerator
from gemini.tiers import MemoryTier, TierLedger

__all__ = ["MemoryProbe", "StorageCounter"]


class MemoryProbe:
    """Measures the non-model peak of compute memory, step by step.

    Args:
        accelerator: the device; None: one whose memory is the host's.
        ledger: knows what chunks hold on it.
    """

    def __init__(self, accelerator: Accelerator | None, ledger: TierLedger) -> None:
        self.non_model_peak_nbytes: int | None = None
        """The most non-model bytes seen in any step; None until one was measured."""
        self._accelerator = accelerator
        self._ledger = ledger

    def begin_step(self) -> None:
        """Start measuring a step, where that costs nothing."""
        if self._accelerator is not None:
            self._accelerator.reset_peak()

    def end_step(self) -> None:
        """Take the step's peak, where that costs nothing."""
        if self._accelerator is not None:
            held = self._ledger.held_nbytes(MemoryTier.DEVICE)
            self._note(self._accelerator.peak_allocated_nbytes() - held)

    @contextmanager
    def trace(self) -> Iterator[None]:
        """Count what operations allocate while the context is open; an accelerator needs nothing of it."""
        if self._accelerator is not None:
            yield
            return
        counter = StorageCounter()
        with counter:
            yield
        self._note(counter.peak_nbytes)

    def _note(self, peak_nbytes: int) -> None:
        self.non_model_peak_nbytes = max(self.non_model_peak_nbytes or 0, peak_nbytes)


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_nbytes = 0
        """The most that was alive at once."""
        self._live_nbytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
            self._count(tensor.untyped_storage(), inputs)
        return output

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in inputs:
            return
        nbytes = storage.nbytes()
        self._known.add(key)
        self._live_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self._live_nbytes)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._live_nbytes -= nbytes
