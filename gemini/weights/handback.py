"""Returns values to a model's parameters when its engine is closed, if memory allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from gemini.errors import GeminiError
from gemini.model.names import named_buffers, named_params
from gemini.weights.access import ParamWeight, WeightAccess
from gemini.weights.ownership import disown
from gemini.weights.values import read_master, read_working

__all__ = ["OriginalTensors", "read_back"]

logger = logging.getLogger(__name__)

KEPT_FREE = 0.1
"""Share of the machine's memory that stays free when weights are handed back."""


@dataclass(frozen=True, slots=True)
class OriginalTensors:
    """Dtypes and devices of a model's parameters and buffers before it was wrapped, by name."""

    params: Mapping[str, tuple[torch.dtype, torch.device]]
    buffers: Mapping[str, tuple[torch.dtype, torch.device]]

    @classmethod
    def of(cls, model: torch.nn.Module) -> OriginalTensors:
        """Record those of a model."""
        return cls(
            {name: (param.dtype, _lasting(param.device)) for name, param in named_params(model)},
            {name: (buffer.dtype, _lasting(buffer.device)) for name, buffer in named_buffers(model)},
        )

    def of_weight(self, weight: ParamWeight) -> tuple[torch.dtype, torch.device]:
        """Return a parameter's; for a parameter that wrapping made, the engine's own."""
        return self.params.get(weight.name, (weight.place.spec.dtype, torch.device("cpu")))

    def hand_back(self, model: torch.nn.Module, access: WeightAccess, values: Mapping[str, torch.Tensor]) -> None:
        """Turn a model's parameters into plain ones with their own values.

        Args:
            model: the model of a closed engine.
            access: the engine's access to weights.
            values: values from `read_back`.
        """
        disown(model, access)
        with torch.no_grad():
            for weight in access.weights:
                weight.param.grad = None
                weight.param.data = values[weight.name]
            self._hand_back_buffers(model)

    def _hand_back_buffers(self, model: torch.nn.Module) -> None:
        given: dict[torch.Tensor, torch.Tensor] = {}
        for name, buffer in named_buffers(model):
            dtype, device = self.buffers.get(name, (buffer.dtype, buffer.device))
            given.setdefault(buffer, buffer.to(device, dtype))
        for module in model.modules():
            for key, found in module._buffers.items():
                if found is not None:
                    module._buffers[key] = given[found]


def _lasting(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def read_back(access: WeightAccess, originals: OriginalTensors) -> dict[str, torch.Tensor] | None:
    """Read all parameters of an engine that is about to be closed.

    Args:
        access: the engine's access to weights.
        originals: original dtypes and devices; parameters that were float32 get their masters.

    Returns:
        Values by name. None, with a line in the log, if memory has no room for them, several ranks share them, or they
        can no longer be read.
    """
    runtime = access.runtime
    nbytes = sum(weight.place.spec.numel * originals.of_weight(weight)[0].itemsize for weight in access.weights)
    memory = psutil.virtual_memory()
    reason = None
    if not runtime.sharding.is_alone:
        reason = "several ranks share them"
    elif nbytes > memory.available - KEPT_FREE * memory.total:
        reason = f"{nbytes} bytes of weights do not fit in the {memory.available} bytes of memory that are available"
    if reason is None:
        try:
            runtime.finish_updates()
            values = {}
            for weight in access.weights:
                dtype, device = originals.of_weight(weight)
                read = read_master if dtype is torch.float32 else read_working
                values[weight.name] = read(runtime, weight.place).to(device, dtype)
            return values
        except (GeminiError, MemoryError) as error:
            reason = f"they cannot be read: {error}"
    logger.info("the closed model's parameters hold no values: %s", reason)
    return None
