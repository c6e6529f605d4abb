"""A wrapped model's state dict: read from, and written to, wherever its weights live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gemini.agreement import agree_on_loading
from gemini.chunk.layout import ParamSlot
from gemini.chunk.plain_names import named_buffers
from gemini.chunk.tensor_parallel import local_part
from gemini.extra_states import load_extra_states
from gemini.model_names import canonical_buffers, canonical_names, compare_names, persistent_buffers
from gemini.runtime import Runtime
from gemini.weights import load_masters

__all__ = ["INSIDE_OF_MODULE", "ReadValue", "load_model_state", "named_values"]

ReadValue = Callable[[Runtime, ParamSlot], torch.Tensor]
"""Returns a parameter's values, a CPU copy in its shape: `read_working` or `read_master` of gemini.weights."""


class _InsideOfModule(dict[str, str]):
    """Says of every name but that of the wrapped model itself that it is to be looked for in there."""

    def get(self, key: str, default: Any = None) -> Any:
        return default if key in self.values() else "module"


INSIDE_OF_MODULE = _InsideOfModule({"": "module"})
"""What torch.distributed.checkpoint.state_dict asks modules for whose state dicts leave a child's name out."""


def named_values(runtime: Runtime, model: torch.nn.Module, read: ReadValue) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield CPU copies of all parameters and persistent buffers; tied names share one.

    With several ranks all must take all of them.

    Args:
        runtime: the engine's.
        model: the wrapped one.
        read: which values.

    Yields:
        Name and values.
    """
    runtime.finish_updates()
    values: dict[str, torch.Tensor] = {}
    slots = runtime.layout.slot_by_name
    for name, canonical in canonical_names(model).items():
        if canonical not in values:
            values[canonical] = read(runtime, slots[canonical])
        yield name, values[canonical]
    buffers = {name: local_part(buffer).detach().cpu().clone() for name, buffer in persistent_buffers(model).items()}
    for name, canonical in canonical_buffers(model).items():
        yield name, buffers[canonical]


def load_model_state(
    runtime: Runtime, model: torch.nn.Module, state_dict: Mapping[str, Any], *, strict: bool
) -> tuple[list[str], list[str]]:
    """Load weights, buffers and modules' extra state; see GeminiDDP.load_state_dict.

    Args:
        runtime: the engine's.
        model: the wrapped one.
        state_dict: of this model, plain or wrapped.
        strict: whether names must match exactly.

    Returns:
        Missing and unexpected names.

    Raises:
        CheckpointMismatchError: names or shapes do not match, here or on another rank; nothing has been loaded.
    """
    slots = runtime.layout.slot_by_name
    missing, unexpected, mismatch = compare_names(model, slots, state_dict, strict=strict)
    agree_on_loading(runtime.sharding, mismatch, state_dict)
    params, buffers = canonical_names(model), dict(named_buffers(model))
    runtime.finish_updates()
    load_masters(runtime, ((slots[params[name]], value) for name, value in state_dict.items() if name in params))
    for name, value in state_dict.items():
        if name not in params and name in buffers:
            local_part(buffers[name]).copy_(value)
    load_extra_states(model, state_dict)
    return missing, unexpected
