"""Repeats a forward in which the device runs out of memory, after chunks have left the device.

It runs again only if it gives what it would have given at once: random generators are set back, and neither the model's
buffers nor the inputs may have changed.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemini.errors import OutOfTierMemoryError
from gemini.model.outputs import tensors_in
from gemini.offload.accelerator import random_states, set_random_states
from gemini.runtime.runtime import Runtime

__all__ = ["OutOfMemoryRetry"]

ADVICE = (
    "use smaller batches, num_batch_slices or activation checkpointing, or lower device_budget by the memory "
    "that other programs take on the device"
)


class OutOfMemoryRetry:
    """Runs the forwards of one engine, and repeats one that runs out of device memory.

    Args:
        model: the user's model.
        runtime: of the engine.
    """

    def __init__(self, model: torch.nn.Module, runtime: Runtime) -> None:
        self._model = model
        self._runtime = runtime
        self._device = runtime.resources.transfers.device
        self._buffers = list(model.buffers())

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model, and call it again if the device was out of memory and can give some.

        Args:
            args: arguments.
            kwargs: arguments by name.

        Returns:
            What it returns.

        Raises:
            OutOfTierMemoryError: the device has run out of memory, and a second attempt did not help or would not be
                exact. The engine can be used as before.
        """
        if not self._runtime.shape.has_device:
            return self._model(*args, **kwargs)
        generators, versions = random_states(self._device), _versions(self._buffers, (args, kwargs))
        try:
            return self._model(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            reason = _let_go_of(error)
        if not self._runtime.sharding.is_alone:  # others run this forward once
            raise OutOfTierMemoryError(f"device tier: out of memory in a forward of this rank: {reason}; {ADVICE}")
        self._runtime.placement.after_failure()
        self._buffers = list(self._model.buffers())
        if versions != _versions(self._buffers, (args, kwargs)):
            raise OutOfTierMemoryError(
                "device tier: out of memory in a forward, which is not repeated because it had changed buffers "
                f"of the model or its inputs: {reason}; chunks have left the device, so the next call has more "
                f"room; if that fails too, {ADVICE}"
            )
        set_random_states(self._device, generators)
        try:
            return self._model(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            reason = _let_go_of(error)
        raise OutOfTierMemoryError(
            "device tier: out of memory in a forward, and again after as many chunks as possible had left the "
            f"device: {reason}; {ADVICE}"
        )


def _versions(buffers: Sequence[torch.Tensor], inputs: Any) -> list[tuple[int, int]]:
    """Return identities and versions, which change if buffers or inputs are replaced or written."""
    tensors = (*buffers, *tensors_in(inputs))
    return [(id(tensor), tensor._version) for tensor in tensors if not tensor.is_inference()]


def _let_go_of(error: torch.OutOfMemoryError) -> str:
    """Return an error's text, and free what the frames that it came through refer to, activations among it."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    return str(error).rstrip(". \n")
